"""Measurements of Slipstream itself, each run as `python -m slipstream_bench.measurements.NAME`."""
