"""What keeps a layer's temporary arrays from living longer, or being larger, than needed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import optimization_barrier
from jaxtyping import Array, Float

from jlora.lora.adapter_tree import Params, join, split, trainable_mask
from jlora.ops.compute_choices import Compute
from jlora.ops.quantize import QUANTIZED_LEAVES, is_quantized
from jlora.ops.quantized_matmul import dequantised, multiplies_codes

# Largest size of one of the MLP's activations that are computed in pieces, in elements: 4,096
# tokens of an 8B model, enough for full-speed matrix products.
_PIECE_SIZE = 4096 * 14336
# The fused kernels take rows in multiples of this.
_ROWS = 256


def gradients_together(
    leaves: Params, x: Float[Array, "B T D"]
) -> tuple[Params, Float[Array, "B T D"]]:
    """Returns a layer's leaves and input unchanged, but ties their gradients together.

    The gradients of the trainable leaves are then computed before those of the layer below.
    XLA would postpone them to the end of the backward pass, and each would keep the
    activations of its layer until then. Frozen leaves stay outside, because their gradients
    would be made as arrays of zeros.
    """
    trainable, frozen = split(leaves, trainable_mask(leaves))
    trainable, x = _tied((trainable, x))
    return join(trainable, frozen), x


@jax.custom_vjp
def _tied(values: Any) -> Any:
    return values


_tied.defvjp(
    lambda values: (values, None),
    lambda _, gradients: (optimization_barrier(gradients),),
)


def in_pieces(
    function: Callable[[Params, Array], Array],
    leaves: Params,
    x: Float[Array, "B T D"],
    count: int,
    compute: Compute,
) -> Float[Array, "B T D"]:
    """Returns `function(leaves, x)`, computed for a part of the positions at a time.

    The backward pass computes each piece again, so only one piece's temporary arrays exist.
    Under a remat that computes the layer again anyway, this costs no further products.
    Weights that products need dequantised are so once in each pass, for all pieces.

    Args:
        function: (leaves, [B, t, D]) -> [B, t, D], each position by itself.
        leaves: of a layer; the trainable ones get gradients.
        x: the input.
        count: of the pieces, which have the same length; see `num_pieces`.
        compute: how to multiply.
    """
    trainable, frozen = split(leaves, trainable_mask(leaves))

    def one(trainable: Params, frozen: Params, piece: Array) -> Array:
        return function(join(trainable, frozen), piece)

    @jax.custom_vjp
    def whole(trainable: Params, frozen: Params, x: Array) -> Array:
        frozen, x = optimization_barrier((frozen, x))
        frozen = _dequantised(frozen, compute)
        done: list[Array] = []
        for piece in jnp.split(x, count, axis=1):
            piece, done = optimization_barrier((piece, done))
            done.append(one(trainable, frozen, piece))
        return jnp.concatenate(done, axis=1)

    def backward(saved: tuple[Params, Params, Array], dy: Array) -> tuple[Any, ...]:
        (trainable, frozen, x), dy = optimization_barrier((saved, dy))
        frozen = _dequantised(frozen, compute)
        total, dxs = jax.tree.map(jnp.zeros_like, trainable), []
        for pair in zip(*(jnp.split(y, count, axis=1) for y in (x, dy)), strict=True):
            # A piece begins when the one before has all its gradients.
            (piece, d_piece), total, dxs = optimization_barrier((pair, total, dxs))
            _, pull = jax.vjp(lambda own, x: one(own, frozen, x), trainable, piece)
            gradients, dx = pull(d_piece)
            total = jax.tree.map(jnp.add, total, gradients)
            dxs.append(dx)
        return total, None, jnp.concatenate(dxs, axis=1)

    whole.defvjp(lambda *args: (whole(*args), args), backward)
    return whole(trainable, frozen, x)


def _dequantised(leaves: Params, compute: Compute) -> Params:
    """Returns the leaves of a layer, quantised kernels in the form that products need."""
    if multiplies_codes(leaves, compute):
        return leaves
    found: Params = {
        name: _dequantised(part, compute) if isinstance(part, dict) else part
        for name, part in leaves.items()
        if name not in QUANTIZED_LEAVES
    }
    return found | (
        {"kernel": dequantised(leaves, compute)} if is_quantized(leaves) else {}
    )


def num_pieces(rows: int, length: int, width: int) -> int:
    """Returns into how many pieces to cut the positions of a device's rows.

    It is the smallest number above 1 by which [piece, width] is at most `_PIECE_SIZE`. If all
    tokens together suit the fused kernels, those of a piece must as well. A length that does
    not divide into pieces of a useful size stays whole.
    """
    tokens = rows * length
    least = max(2, -(-tokens * width // _PIECE_SIZE))
    for count in range(least, tokens // _ROWS + 1):
        if length % count == 0 and (tokens // count % _ROWS == 0 or tokens % _ROWS):
            return count
    return 1
