"""Digests of arrays, on the host and on the devices."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def flatten(tree: Any) -> dict[str, Any]:
    """Returns {dotted path: leaf} of a tree."""
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
    # Mix the bits first: multiplied by an odd weight, a sign bit stays where it is, so
    # that x and -x could be exchanged unnoticed.
    bits ^= bits >> 16
    bits *= jnp.uint32(0x85EBCA6B)
    bits ^= bits >> 13
    for axis, size in enumerate(leaf.shape):
        # Odd weights are invertible modulo 2^32, so a single change always shows.
        weight = jnp.arange(size, dtype=jnp.uint32) * jnp.uint32(2654435761 + 2 * axis)
        shape = [size if i == axis else 1 for i in range(leaf.ndim)]
        bits = bits * (weight.reshape(shape) | jnp.uint32(1))
    return jnp.sum(bits, dtype=jnp.uint32)


def fingerprint(tree: Any) -> str:
    """Returns a digest of every leaf's path, shape, dtype and a checksum of its bits.

    The checksum is computed on the devices in integers, so that it does not depend on
    backend, mesh or order of summation. It costs one read of the weights.
    """
    lines = [
        f"{path} {leaf.shape} {leaf.dtype.name} {int(_checksum(leaf))}"
        for path, leaf in sorted(flatten(tree).items())
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
