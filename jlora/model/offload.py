"""Remat "offload": a layer keeps its input only, and that in the host's memory.

The backward pass computes a layer again from its input, as remat "full" does. It is one
custom gradient over all layers, not `jax.checkpoint` with an offloading policy, since
the order of the copies decides everything: XLA starts a copy as early and ends it as
late as it may, so that by itself every input would be on the device twice. Barriers
tie each copy to the layer beside which it runs. To the host: a layer's input, while the
layer computes. Back: the input of the layer below, while this layer's gradient is made.
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
    call: Any,
) -> Float[Array, "B T D"]:
    """Returns what the last layer makes of `x`, each layer's input its only residual.

    Gradients are those of the trainable leaves and of `x`; every other leaf's is 0. They
    cannot be differentiated again.

    Args:
        layer: (params, seeds, x, call) -> x, the same for every layer.
        params: per layer.
        seeds: per layer, of dropout; None without.
        x: input of the first layer.
        call: what all layers share; not differentiated.
    """

    def one(
        trainable: Params, frozen: Params, seeds: Any, x: Array, call: Any
    ) -> Array:
        return layer(join(trainable, frozen), seeds, x, call)

    @jax.custom_vjp
    def stack(
        trainable: list[Params], frozen: list[Params], seeds: Any, x: Array, call: Any
    ) -> Array:
        for own in zip(trainable, frozen, seeds, strict=True):
            x = one(*own, x, call)
        return x

    def forward(
        trainable: list[Params], frozen: list[Params], seeds: Any, x: Array, call: Any
    ) -> tuple[Array, Any]:
        inputs: list[Array] = []
        for own in zip(trainable, frozen, seeds, strict=True):
            inputs.append(x)
            x = one(*own, x, call)
            if len(inputs) < len(seeds):  # the last is needed again at once
                on_host = jax.device_put(inputs[-1], jax.memory.Space.Host)
                x, inputs[-1] = optimization_barrier((x, on_host))
        return x, (trainable, frozen, seeds, inputs, call)

    def backward(residuals: Any, dy: Array) -> tuple[Any, ...]:
        trainable, frozen, seeds, inputs, call = residuals
        gradients = []
        # Without a barrier XLA would keep what the forward pass has made of it.
        x, dy = optimization_barrier((inputs[-1], dy))
        for i in reversed(range(len(inputs))):
            below = x
            if i:
                on_host, dy = optimization_barrier((inputs[i - 1], dy))
                below = jax.device_put(on_host, jax.memory.Space.Device)
            _, pull = jax.vjp(
                lambda own, x, i=i: one(own, frozen[i], seeds[i], x, call),
                trainable[i],
                x,
            )
            gradient, dy = pull(dy)
            # The copy ends with this layer, and the layer's gradients are not put off.
            gradient, dy, x = optimization_barrier((gradient, dy, below))
            gradients.append(gradient)
        return gradients[::-1], None, None, dy, None

    stack.defvjp(forward, backward)
    parts = [split(own, trainable_mask(own)) for own in params]
    trainable, frozen = (list(part) for part in zip(*parts, strict=True))
    return stack(trainable, frozen, seeds, x, call)
