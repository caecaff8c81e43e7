"""The keys and values of the tokens so far, which decoding does not compute again."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.config.llama_config import LlamaConfig

KeysValues = tuple[Array, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values [B K, S, H] of every layer; of row b the first `length[b]` are filled.

    Rows and heads are one axis before the positions, as the products of attention read them:
    a step of one row then writes in place, where XLA would copy a cache of another shape.

    Not typed as arrays, because JAX makes trees of this form that hold other things.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    length: Any
    """[B]."""

    @classmethod
    def empty(cls, config: LlamaConfig, batch: int, size: int, dtype: Any) -> "KVCache":
        """Returns a cache with room for `size` tokens in each of `batch` rows."""
        shape = (batch * config.num_key_value_heads, size, config.head_dim)
        layers = range(config.num_hidden_layers)
        return cls(
            keys=tuple(jnp.zeros(shape, dtype) for _ in layers),
            values=tuple(jnp.zeros(shape, dtype) for _ in layers),
            length=jnp.zeros(batch, jnp.int32),
        )

    @property
    def size(self) -> int:
        """Tokens for which each row has room."""
        return self.keys[0].shape[1]


def write_at(
    cached: KeysValues,
    new: tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]],
    offset: Int[Array, " B"],
) -> KeysValues:
    """Returns one layer's keys and values with the new tokens' from `offset` on.

    Written in place where the caller gives the cache away.
    """

    def write(old: Array, x: Array) -> Array:
        rows, length, heads, dim = x.shape
        x = x.astype(old.dtype).swapaxes(1, 2).reshape(rows * heads, length, dim)
        if rows == 1:  # a copy of a block, where several rows are a scatter
            return jax.lax.dynamic_update_slice(old, x, (0, offset[0], 0))
        return jax.vmap(
            lambda head, part, start: jax.lax.dynamic_update_slice(
                head, part, (start, 0)
            )
        )(old, x, jnp.repeat(offset, heads))

    k, v = (write(old, x) for old, x in zip(cached, new, strict=True))
    return k, v
