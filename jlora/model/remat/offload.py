"""Remat "offload": only the inputs of layers are saved, in the host's memory.

As under remat "full", the backward pass computes each layer again from its input. While a
layer computes, its input is copied to the host. While its gradient is computed, the input of
the layer below is copied back.

This is one custom gradient over all layers and not `jax.checkpoint` with an offloading
policy, because XLA starts a copy as early and ends it as late as possible: all inputs would
be on the device twice. Barriers tie each copy to the layer beside which it runs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.lax import optimization_barrier
from jaxtyping import Array, Float

from jlora.lora.adapter_tree import Params, join, split, trainable_mask


def run_offloaded(
    layer: Callable[..., Array],
    params: Sequence[Params],
    seeds: Sequence[Any],
    x: Float[Array, "B T D"],
    shared: Any,
) -> Float[Array, "B T D"]:
    """Returns the output of the last layer.

    Only trainable leaves and `x` get gradients, and those cannot be differentiated again.

    Args:
        layer: (params, seeds, x, shared) -> x, the same for every layer.
        params: of every layer.
        seeds: of every layer's dropout; None without.
        x: input of the first layer.
        shared: the same for all layers; gets no gradient.
    """

    def one(
        trainable: Params, frozen: Params, seeds: Any, x: Array, shared: Any
    ) -> Array:
        return layer(join(trainable, frozen), seeds, x, shared)

    @jax.custom_vjp
    def stack(
        trainable: list[Params], frozen: list[Params], seeds: Any, x: Array, shared: Any
    ) -> Array:
        for own in zip(trainable, frozen, seeds, strict=True):
            x = one(*own, x, shared)
        return x

    def forward(
        trainable: list[Params], frozen: list[Params], seeds: Any, x: Array, shared: Any
    ) -> tuple[Array, Any]:
        inputs: list[Array] = []
        for own in zip(trainable, frozen, seeds, strict=True):
            inputs.append(x)
            x = one(*own, x, shared)
            if len(inputs) < len(seeds):  # the backward pass begins with the last
                on_host = jax.device_put(inputs[-1], jax.memory.Space.Host)
                x, inputs[-1] = optimization_barrier((x, on_host))
        return x, (trainable, frozen, seeds, inputs, shared)

    def backward(residuals: Any, dy: Array) -> tuple[Any, ...]:
        trainable, frozen, seeds, inputs, shared = residuals
        gradients = []
        # Without a barrier XLA would save what the forward pass computed from it.
        x, dy = optimization_barrier((inputs[-1], dy))
        for i in reversed(range(len(inputs))):
            # Without the barrier XLA would save what the forward pass made of the leaves,
            # such as dequantised weights.
            (leaves, fixed, key), dy = optimization_barrier(
                ((trainable[i], frozen[i], seeds[i]), dy)
            )
            below = x
            if i:
                on_host, dy = optimization_barrier((inputs[i - 1], dy))
                below = jax.device_put(on_host, jax.memory.Space.Device)
            _, pull = jax.vjp(
                lambda own, x, fixed=fixed, key=key: one(own, fixed, key, x, shared),
                leaves,
                x,
            )
            gradient, dy = pull(dy)
            # So that the copy ends with this layer, and its gradients are not delayed.
            gradient, dy, x = optimization_barrier((gradient, dy, below))
            gradients.append(gradient)
        return gradients[::-1], None, None, dy, None

    stack.defvjp(forward, backward)
    parts = [split(own, trainable_mask(own)) for own in params]
    trainable, frozen = (list(part) for part in zip(*parts, strict=True))
    return stack(trainable, frozen, seeds, x, shared)
