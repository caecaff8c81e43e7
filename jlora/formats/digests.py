"""A tree's leaves by path, and digests of them: in memory, and where they lie."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def flatten(tree: Any) -> dict[str, Any]:
    """Returns {dotted path: leaf}; empty nodes vanish."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def leaf_digest(leaf: Any) -> str:
    """Returns the sha256 of a leaf's shape, dtype and bytes, as hexadecimal text."""
    array = np.ascontiguousarray(leaf)
    digest = hashlib.sha256(f"{array.shape} {array.dtype.name} ".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    """Returns a position-dependent sum of the leaf's bits, modulo 2^32."""
    unsigned = {2: jnp.uint16, 4: jnp.uint32, 1: jnp.uint8}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    # Mixed, as an odd weight leaves a sign bit where it is: x and -x could trade places.
    bits ^= bits >> 16
    bits *= jnp.uint32(0x85EBCA6B)
    bits ^= bits >> 13
    for axis, size in enumerate(leaf.shape):
        # Odd weights are invertible modulo 2^32, so no single change can cancel out.
        weight = jnp.arange(size, dtype=jnp.uint32) * jnp.uint32(2654435761 + 2 * axis)
        shape = [size if i == axis else 1 for i in range(leaf.ndim)]
        bits = bits * (weight.reshape(shape) | jnp.uint32(1))
    return jnp.sum(bits, dtype=jnp.uint32)


def fingerprint(tree: Any) -> str:
    """Returns a digest of every leaf's path, shape, dtype and a checksum of its bits.

    The checksum is integer arithmetic on the device: the same on any backend, mesh and
    order of summation, at the cost of one read of the weights.
    """
    lines = [
        f"{path} {leaf.shape} {leaf.dtype.name} {int(_checksum(leaf))}"
        for path, leaf in sorted(flatten(tree).items())
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
