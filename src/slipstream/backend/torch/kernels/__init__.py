"""The same operators as Triton kernels, each with a fixed order of sums.

A kernel's blocks have constant sizes, but for the tile of tokens in products, which grows with the step. Weights take
the tall side of the matrix unit there (`out.T = weight @ x.T`), so a tile of 16 to 128 tokens is the unit's other side
and becomes the same kind of instruction, which adds up in the same order; and 16 tokens waste nothing. Products of
float32 ask for `ieee`, since TF32 is the default. Sizes that differ from step to step are not specialised on: one
program serves all steps.
"""
