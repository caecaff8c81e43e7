"""Several adapters over one base, of which each row of a batch has its own."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jlora.config.llama_config import LlamaConfig
from jlora.errors import UnsupportedError
from jlora.formats.peft.adapter import Adapter
from jlora.formats.peft.attach_adapter import attach_adapter
from jlora.formats.tensor_names import set_leaf
from jlora.lora.adapter_tree import (
    EMBEDDING,
    HEAD,
    Params,
    is_adapter,
    modules,
    plain_tree,
)

_PLAIN = {"lora_A", "lora_B", "lora_scaling"}


class Stacked(NamedTuple):
    """The factors of one module of all adapters; number 0 is no adapter."""

    a: Any
    """[N, in, R]: R is the largest rank, zeros follow a smaller one."""
    b: Any
    """[N, R, out]."""
    scaling: Any
    """[N, 1, 1]."""


def stack_adapters(
    params: Params, config: LlamaConfig, adapters: Sequence[Adapter]
) -> dict[str, Stacked]:
    """Returns {params path of a module: the factors of all adapters}.

    Raises:
        UnsupportedError: one is not plain LoRA on the layers.
        CorruptError: one belongs to another model.
    """
    found = [_factors(params, config, adapter) for adapter in adapters]
    stacked = {}
    for path in dict.fromkeys(path for own in found for path in own):
        sizes = {own[path][0].shape[1] for own in found if path in own}
        some = next(own[path] for own in found if path in own)
        none = jnp.zeros_like(some[0]), jnp.zeros_like(some[1]), jnp.float32(0)
        rows = [none, *(own.get(path, none) for own in found)]
        a, b, scaling = zip(*rows, strict=True)
        rank = max(sizes)
        stacked[path] = Stacked(
            jnp.stack([_padded(x, rank, 1) for x in a]),
            jnp.stack([_padded(x, rank, 0) for x in b]),
            jnp.stack(scaling)[:, None, None],
        )
    return stacked


def _padded(x: Array, rank: int, axis: int) -> Array:
    fill = [(0, 0), (0, 0)]
    fill[axis] = (0, rank - x.shape[axis])
    return jnp.pad(x, fill)


def _factors(
    params: Params, config: LlamaConfig, adapter: Adapter
) -> dict[str, tuple[Any, Any, Any]]:
    found, base = {}, modules(params)
    for name, leaves in modules(attach_adapter(params, config, adapter)).items():
        own = {key for key in leaves if is_adapter(key)}
        # PiSSA and OLoRA change the kernel, and some adapters have tables of their own.
        changed = {
            key for key in leaves if leaves[key] is not base[name].get(key)
        } - own
        if not own and not changed:
            continue
        if own != _PLAIN or changed or name in (EMBEDDING, HEAD):
            raise UnsupportedError(
                f"{adapter.location}: not plain LoRA at {name} "
                f"({', '.join(sorted(own | changed))}), which cannot share its base with "
                "other adapters; merge it (jlora export) and serve the merged model"
            )
        path = name.removeprefix("model.").replace(".", "/")
        found[path] = leaves["lora_A"], leaves["lora_B"], leaves["lora_scaling"]
    return found


def with_rows(
    params: Params, stacked: dict[str, Stacked], numbers: Int[Array, " B"]
) -> Params:
    """Returns the base with the factors of each row's adapter beside its kernels."""
    result = plain_tree(params)
    for path, own in _rows(stacked, numbers).items():
        for leaf, factor in zip(("lora_A", "lora_B", "lora_scaling"), own, strict=True):
            set_leaf(result, f"{path}/{leaf}", factor)
    return result


@jax.jit
def _rows(stacked: dict[str, Stacked], numbers: Int[Array, " B"]) -> dict[str, Stacked]:
    return jax.tree.map(lambda factor: factor[numbers], stacked)
