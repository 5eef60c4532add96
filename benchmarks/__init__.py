"""Measurements of Slipstream itself, each run as `python -m benchmarks.NAME`."""
