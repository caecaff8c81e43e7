"""Operations on arrays that the layers are made of, each fast on every platform.

Read `compute_choices` first: it decides what every `auto` means for the devices of a mesh.
Then `matmul`, `elementwise` and `attention`, and last `dropout` and `quantize` (frozen
weights in 4 or 8 bits). The package `hopper` has fused kernels for H100 and H200.
"""
