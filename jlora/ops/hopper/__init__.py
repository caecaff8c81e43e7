"""Fused matrix products for H100 and H200 GPUs, written in Pallas.

Read in this order:

- fused_projections: the projections that share an input, and the MLP, with their gradients
- lora_factors: pads and concatenates the LoRA factors of such projections
- operands: what is multiplied: activations, weights and factors, or their codes of 8 bits
- quantize_kernel: rounds activations and gradients to such codes
- product_kernels: sums of matrix products, and SwiGLU, on top of matmul_kernel
- dropout_kernels: x A and its gradients with dropout on x
- swiglu_kernel: the gradients of SwiGLU and of the adapters around it
- kernel_parts: what the kernels share; mosaic_gpu imports Pallas at its first use
"""
