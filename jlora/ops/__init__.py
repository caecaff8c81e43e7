"""Functions on arrays that the layers are made of, each with a choice of kernels.

Read `matmul`, `elementwise` and `attention` first, then `dropout` and `quantize` (frozen
weights in 4 or 8 bits). The package `hopper` has fused kernels for H100 and H200.
"""
