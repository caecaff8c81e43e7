"""Pallas Mosaic GPU, imported when the first kernel is built.

The import takes 0.7 s, which commands that run no such kernel should not pay. Kernels
write `from jlora.ops.hopper import mosaic_gpu as plgpu` and use it as the real module.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    from jax.experimental.pallas import mosaic_gpu

    return getattr(mosaic_gpu, name)
