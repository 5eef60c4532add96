"""Backends: a model's tensors and KV blocks, and nothing about requests."""
