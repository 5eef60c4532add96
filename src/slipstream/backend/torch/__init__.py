"""PyTorch backend: a model's own class from `transformers`, with attention, products and experts of our own.

A token's bits must not depend on how its sequence was cut, or on what else a step computes. No library's kernels
promise that for every step, so each operator in which many numbers are summed is ours (`Operators`), and sums in one
order that depends on the model's shapes alone.
"""
