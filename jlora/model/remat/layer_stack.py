"""Layers of which something is fetched while another layer computes.

On a mesh that splits the weights, a layer's are gathered while the layer before it computes,
and once more in the backward pass. So a device holds those of two layers at a time.

Under remat "offload" only the inputs of layers are saved, in the host's memory. While a layer
computes, its input is copied to the host. While its gradient is computed, the input of
the layer below is copied back.

This is one custom gradient over all layers and not `jax.checkpoint` with a policy, because
XLA starts a copy as early and ends it as late as possible: all inputs, or weights, would
be on the device at once. Barriers tie each copy to the layer beside which it runs.

`run_loops` does the same in a program with loops, which is short: there each turn fetches
what its own layer needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import optimization_barrier
from jaxtyping import Array, Float

from jlora.lora.adapter_tree import Params, join, split, trainable_mask
from jlora.model.remat.layer_runs import layers_of
from jlora.parallel.own_program import gathered, holds_parts

Pulls = tuple[Any, Any, Any]


class LayerParts(NamedTuple):
    """A layer as three functions, the same for every layer."""

    before: Callable[..., tuple[Array, Array, Array]]
    """(params, seeds, x, shared) -> queries, keys, values."""
    attention: Callable[..., Array]
    """(queries, keys, values, shared) -> the outputs of heads."""
    after: Callable[..., Array]
    """(params, seeds, x, the outputs of heads) -> x."""


def run_stack(
    parts: LayerParts,
    params: Sequence[Params],
    seeds: Sequence[Any],
    x: Float[Array, "B T D"],
    shared: Any,
    *,
    remat: str,
) -> Float[Array, "B T D"]:
    """Returns the output of the last layer.

    Only trainable leaves and `x` get gradients, and those cannot be differentiated again.

    Args:
        parts: of a layer; `remat` is applied here if it is full or offload, and has to be
            applied there otherwise.
        params: of every layer; frozen ones may be a device's parts.
        seeds: of every layer's dropout; None without.
        x: input of the first layer.
        shared: the same for all layers; gets no gradient.
        remat: none, minimal, full or offload.
    """
    recomputes = remat in ("full", "offload")

    @jax.custom_vjp
    def stack(*args: Any) -> Array:
        return forward(*args)[0]

    def forward(
        trainable: list[Params], frozen: list[Params], seeds: Any, x: Array, shared: Any
    ) -> tuple[Array, Any]:
        saved: list[Any] = []
        weights, last = gathered(frozen[0]), len(frozen) - 1
        for i in range(len(frozen)):
            inputs, own = x, (trainable[i], weights, seeds[i])
            following = {} if i == last else frozen[i + 1]
            x, ahead, pulls = _forward(parts, *own, x, shared, following)
            if not recomputes:
                saved.append(_without(pulls, weights))
            elif (
                remat == "offload" and i < last
            ):  # the backward pass begins with the last
                on_host = jax.device_put(inputs, jax.memory.Space.Host)
                x, on_host = optimization_barrier((x, on_host))
                saved.append(on_host)
            else:
                saved.append(inputs)
            weights = ahead
        return x, (trainable, frozen, seeds, saved, shared)

    def backward(residuals: Any, dy: Array) -> tuple[Any, ...]:
        trainable, frozen, seeds, saved, shared = residuals
        gradients = []
        # Without a barrier XLA would use the weights of the forward pass, and so keep them.
        (shards, kept), dy = optimization_barrier(((frozen[-1], saved[-1]), dy))
        weights = gathered(shards)
        for i in reversed(range(len(frozen))):
            # Without the barrier XLA would save what the forward pass made of the leaves,
            # such as dequantised weights.
            (leaves, fixed, key), dy = optimization_barrier(
                ((trainable[i], weights, seeds[i]), dy)
            )
            below = saved[i - 1] if i else None
            if remat == "offload" and i:
                on_host, dy = optimization_barrier((below, dy))
                below = jax.device_put(on_host, jax.memory.Space.Device)
            if recomputes:
                own = leaves, fixed, key
                _, _, pulls = _forward(parts, *own, kept, shared, {})
            else:
                pulls = _with(kept, fixed)
            following = frozen[i - 1] if i else {}
            gradient, dy, weights = _backward(pulls, dy, following)
            # So that what is fetched is there with this layer, and its gradients are not
            # delayed.
            gradient, dy, kept = optimization_barrier((gradient, dy, below))
            gradients.append(gradient)
        return gradients[::-1], None, None, dy, None

    stack.defvjp(forward, backward)
    halves = [split(own, trainable_mask(own)) for own in params]
    trainable, frozen = (list(half) for half in zip(*halves, strict=True))
    return stack(trainable, frozen, seeds, x, shared)


def run_loops(
    parts: LayerParts,
    params: Params,
    seeds: Sequence[Any],
    x: Float[Array, "B T D"],
    shared: Any,
    *,
    remat: str,
) -> Float[Array, "B T D"]:
    """Returns what `run_stack` does, computed in a loop over each run of equal layers.

    A loop's program is that of one layer. Each turn gathers the weights of its own layer, in
    both passes, so those of one layer are on the device at a time; nothing but that layer's
    products can hide it.

    Args:
        parts: as for `run_stack`, and so is what gets gradients.
        params: all layers, as `jlora.model.remat.layer_runs.stacked` returns them.
        seeds: of every layer's dropout; None without.
        x: input of the first layer.
        shared: the same for all layers; gets no gradient.
        remat: none, minimal, full or offload.
    """
    for run in sorted(params, key=lambda run: int(layers_of(run)[0])):
        own = [seeds[int(name)] for name in layers_of(run)]
        keys = None if own[0] is None else jnp.stack(own)
        x = _run_loop(parts, params[run], keys, x, shared, remat)
    return x


def _run_loop(
    parts: LayerParts, params: Params, seeds: Any, x: Array, shared: Any, remat: str
) -> Array:
    """Returns the output of the last of equal layers, of leaves [layers, ...]."""
    recomputes = remat in ("full", "offload")

    @jax.custom_vjp
    def stack(*args: Any) -> Array:
        return forward(*args)[0]

    def forward(
        trainable: Params, frozen: Params, seeds: Any, x: Array, shared: Any
    ) -> tuple[Array, Any]:
        def layer(x: Array, own: Any) -> tuple[Array, Any]:
            leaves, shards, key = own
            weights = gathered(shards)
            out, _, pulls = _forward(parts, leaves, weights, key, x, shared, {})
            if not recomputes:
                return out, _without(pulls, (leaves, weights, key, shared))
            if remat == "offload":
                return out, jax.device_put(x, jax.memory.Space.Host)
            return out, x

        x, saved = jax.lax.scan(layer, x, (trainable, frozen, seeds))
        return x, (trainable, frozen, seeds, saved, shared)

    def backward(residuals: Any, dy: Array) -> tuple[Any, ...]:
        trainable, frozen, seeds, saved, shared = residuals

        def layer(dy: Array, own: Any) -> tuple[Array, Params]:
            leaves, shards, key, kept = own
            weights = gathered(shards)
            if recomputes:
                if remat == "offload":
                    kept = jax.device_put(kept, jax.memory.Space.Device)
                _, _, pulls = _forward(parts, leaves, weights, key, kept, shared, {})
            else:
                pulls = _with(kept, (leaves, weights, key, shared))
            gradient, dy, _ = _backward(pulls, dy, {})
            return dy, gradient

        inputs = trainable, frozen, seeds, saved
        dy, gradients = jax.lax.scan(layer, dy, inputs, reverse=True)
        return gradients, None, None, dy, None

    stack.defvjp(forward, backward)
    trainable, frozen = split(params, trainable_mask(params))
    return stack(trainable, frozen, seeds, x, shared)


def _forward(
    parts: LayerParts,
    trainable: Params,
    frozen: Params,
    seeds: Any,
    x: Array,
    shared: Any,
    following: Params,
) -> tuple[Array, Params, Pulls]:
    """Returns a layer's output, the `following` weights gathered, and its gradients."""
    qkv, pull_before = jax.vjp(
        lambda own, x: parts.before(join(own, frozen), seeds, x, shared), trainable, x
    )
    qkv, ahead = _gathered_from(qkv, following)
    out, pull_attention = jax.vjp(lambda *qkv: parts.attention(*qkv, shared), *qkv)
    if ahead is not following and "kernel_q" in ahead["mlp"]["down_proj"]:
        # These are few bytes: attention takes longer, and XLA would begin later.
        out, ahead = optimization_barrier((out, ahead))
    x, pull_after = jax.vjp(
        lambda own, x, out: parts.after(join(own, frozen), seeds, x, out),
        trainable,
        x,
        out,
    )
    return x, ahead, (pull_before, pull_attention, pull_after)


def _backward(
    pulls: Pulls, dy: Array, following: Params
) -> tuple[Params, Array, Params]:
    """Returns the gradients of a layer's leaves and input, and `following` gathered."""
    pull_before, pull_attention, pull_after = pulls
    gradient, dx, d_out = pull_after(dy)
    d_out, ahead = _gathered_from(d_out, following)
    d_qkv = pull_attention(d_out)
    if ahead is not following:
        # Without it, XLA would gather beside the last small products.
        d_qkv, ahead = optimization_barrier((d_qkv, ahead))
    more, dx_before = pull_before(d_qkv)
    return jax.tree.map(jnp.add, gradient, more), dx + dx_before, ahead


def _gathered_from(start: Any, weights: Params) -> tuple[Any, Params]:
    """Returns arrays as they are, and weights whose gathering starts when these exist.

    That is just before attention. Its kernels take what multiprocessors are free, whereas a
    fused product would wait for those that copy.
    """
    if not weights or not holds_parts():
        return start, weights
    start, weights = optimization_barrier((start, weights))
    return start, gathered(weights)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Known:
    """Stands for an array that the backward pass has anyway."""

    index: int


def _without(pulls: Pulls, known: Any) -> Pulls:
    """Returns the functions without the arrays of this tree that they hold."""
    places = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(known))}
    leaves, structure = jax.tree.flatten(pulls)
    found = [_Known(places[id(x)]) if id(x) in places else x for x in leaves]
    return jax.tree.unflatten(structure, found)


def _with(pulls: Pulls, known: Any) -> Pulls:
    """Returns the functions with these arrays in the place of those taken out."""
    leaves = jax.tree.leaves(known)
    return jax.tree.map(
        lambda x: leaves[x.index] if isinstance(x, _Known) else x,
        pulls,
        is_leaf=lambda x: isinstance(x, _Known),
    )
