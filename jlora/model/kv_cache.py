"""The keys and values of the tokens so far, which decoding does not compute again."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jlora.config.llama_config import LlamaConfig

KeysValues = tuple[Array, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values [B, S, K, H] of every layer; the first `length` of S are filled."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Int[Array, ""]

    @classmethod
    def empty(cls, config: LlamaConfig, batch: int, size: int, dtype: Any) -> "KVCache":
        """Returns a cache with room for `size` tokens in each of `batch` rows."""
        shape = (batch, size, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        return cls(
            keys=tuple(jnp.zeros(shape, dtype) for _ in layers),
            values=tuple(jnp.zeros(shape, dtype) for _ in layers),
            length=jnp.int32(0),
        )


def write_at(cached: KeysValues, new: KeysValues, offset: Array) -> KeysValues:
    """Returns one layer's keys and values with the new tokens' from `offset` on."""
    k, v = (
        jax.lax.dynamic_update_slice(old, x.astype(old.dtype), (0, offset, 0, 0))
        for old, x in zip(cached, new, strict=True)
    )
    return k, v
