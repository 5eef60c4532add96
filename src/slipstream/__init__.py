"""Slipstream: a stateful inference server for agents that call tools."""
