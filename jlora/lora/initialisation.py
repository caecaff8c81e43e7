"""Add a new adapter to a model: the leaves that a `LoraConfig` asks for, initialised.

Source: PEFT `tuners/lora/layer.py` (`reset_lora_parameters`, `orthogonal_init`,
`pissa_init`, `olora_init`), `utils/other.py` (`modules_to_save`, token rows); "PiSSA"
(Meng et al., 2024), "OLoRA" (Bueyuekakyuez, 2024).
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.config.lora_config import LoraConfig
from jlora.errors import UnsupportedError, UsageError, listing
from jlora.lora.adapter_tree import (
    EMBEDDING,
    HEAD,
    Params,
    is_adapter,
    modules,
    weight_in,
    with_adapter,
)
from jlora.lora.lora_dense import column_norms
from jlora.lora.target_modules import select_trainable
from jlora.ops.quantize import QUANTIZED_LEAVES, is_quantized, kernel_shape


def add_lora(params: Mapping[str, Any], config: LoraConfig, key: Array) -> Params:
    """Returns the parameters with a new adapter for the modules that `config` selects.

    New leaves are float32; those of the base are shared, not copied. Every module draws
    from a key of its own, so its initial values do not depend on the other targets.

    The tree holds no dropout rate. In a training loop of your own, `config.lora_dropout`
    is an attribute of the model, `model.clone(lora_dropout=rate)`, and acts where
    `rngs={"dropout": key}` is passed. train.py does this itself.

    Raises:
        UsageError, UnsupportedError: as `select_trainable`; there is an adapter already, or
            a rank is larger than PiSSA or OLoRA can take out of a weight.
    """
    if config.bias != "none":
        raise UnsupportedError(
            f"lora.bias={config.bias!r}: jlora uses trained biases but does not train "
            "them; leave it at 'none', or name modules in lora.modules_to_save"
        )
    found = modules(params)
    if any(is_adapter(leaf) for leaves in found.values() for leaf in leaves):
        raise UsageError("these parameters have an adapter already; merge it first")
    selection = select_trainable(
        config,
        list(found),
        tied=HEAD not in found,
        vocab_size=_shape(found, EMBEDDING)[0] if EMBEDDING in found else 0,
        strict=True,
    )
    if needs_residual_base(config):
        _check_ranks(config, found, selection.adapted)
    numbers = _key_numbers(list(found))
    new: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, (rank, scaling) in selection.adapted.items():
        own_key = jax.random.fold_in(key, numbers[name])
        new[name] |= _lora_leaves(
            config, found, name, own_key, rank=rank, scaling=scaling
        )
    for name in selection.saved:
        new[name] |= _trained_copies(found, name)
    for name, ids in selection.tokens.items():
        new[name] |= _token_leaves(found, name, ids)
    if selection.shared:
        new[HEAD] = {"lora_shared": jnp.float32(1)}
    return with_adapter(params, new)


def _check_ranks(
    config: LoraConfig, found: dict[str, Params], adapted: Mapping[str, Any]
) -> None:
    """Refuses ranks above what a matrix has: PiSSA and OLoRA take A and B out of it."""
    wrong = [
        f"rank {rank} of {name} {list(shape)}"
        for name, (rank, _) in adapted.items()
        if name != EMBEDDING and rank > min(shape := _shape(found, name))
    ]
    if wrong:
        raise UsageError(
            f"lora.init_lora_weights={config.init_lora_weights!r} takes its factors out of "
            f"each weight, which has none left for {listing(wrong)}; lower lora.r, or use "
            "lora.rank_pattern for these modules"
        )


def _key_numbers(names: list[str]) -> dict[str, int]:
    """Returns the number that makes the key of each module that can have LoRA."""
    projections = [name for name in names if name.endswith("_proj")]
    return {name: i for i, name in enumerate([*projections, HEAD, EMBEDDING])}


def _lora_leaves(
    config: LoraConfig,
    found: dict[str, Params],
    name: str,
    key: Array,
    *,
    rank: int,
    scaling: float,
) -> dict[str, Array]:
    """Returns the leaves of LoRA, and of DoRA if it is used, beside one weight."""
    method = config.init_lora_weights
    leaves = {"lora_scaling": jnp.float32(scaling)}
    if name == EMBEDDING:
        a, b = _embedding_factors(method, key, _shape(found, name), rank)
    elif needs_residual_base(config):
        kernel = weight_in(found, name)
        a, b = principal_factors(method, kernel, key, rank=rank, scaling=scaling)
        leaves |= {"lora_A0": a, "lora_B0": b}
    elif method == "orthogonal":
        a, b = _orthogonal_factors(key, _shape(found, name), rank)
    else:
        a, b = _random_factors(method, key, _shape(found, name), rank)
    leaves |= {"lora_A": a, "lora_B": b}
    if config.use_dora:
        weight = weight_in(found, name)
        leaves["lora_norm_squared"] = norm_squared(weight)
        # The norm of what the layer computes now, so that DoRA begins as LoRA does.
        leaves["lora_magnitude"] = column_norms({**leaves, "kernel": weight})
    return leaves


def _shape(found: dict[str, Params], name: str) -> tuple[int, ...]:
    """Returns the shape of `weight_in`, without dequantising or transposing anything."""
    if name in (EMBEDDING, HEAD) and "kernel" not in found.get(name, {}):
        shape = found[EMBEDDING]["embedding"].shape
        return shape if name == EMBEDDING else shape[::-1]
    return kernel_shape(found[name])


def norm_squared(weight: Array) -> Float[Array, " D_out"]:
    """Returns the sum of squares of every column of a weight, in float32."""
    return jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=0)


def _trained_copies(found: dict[str, Params], name: str) -> dict[str, Array]:
    """Returns float32 copies of all leaves of a module, to be trained in their place."""
    leaves = dict(found.get(name, {}))
    if not leaves or is_quantized(leaves):
        leaves |= {"kernel": weight_in(found, name)}
    return {
        f"trained_{leaf}": value.astype(jnp.float32)
        for leaf, value in leaves.items()
        if leaf not in QUANTIZED_LEAVES
    }


def _token_leaves(
    found: dict[str, Params], name: str, ids: list[int]
) -> dict[str, Array]:
    """Returns the trained rows of an embedding, or columns of a head, and their tokens."""
    weight, tokens = weight_in(found, name), jnp.asarray(ids, jnp.int32)
    rows = (weight if name == EMBEDDING else weight.T)[tokens]
    return {"token_ids": tokens, "token_rows": rows.astype(jnp.float32)}


def _embedding_factors(
    method: bool | str, key: Array, shape: tuple[int, ...], rank: int
) -> tuple[Array, Array]:
    """Returns A [V, R] and B [R, D] of an embedding: A is zero, B is normal.

    With init_lora_weights=false, both are normal.
    """
    key_a, key_b = jax.random.split(key)
    a = jnp.zeros((shape[0], rank), jnp.float32)
    if method is False:
        a = jax.random.normal(key_a, a.shape, jnp.float32)
    return a, jax.random.normal(key_b, (rank, shape[1]), jnp.float32)


def _random_factors(
    method: bool | str, key: Array, shape: tuple[int, ...], rank: int
) -> tuple[Array, Array]:
    """Returns A [in, R] and B [R, out] of a dense layer: A is uniform, B is zero.

    With init_lora_weights=false, B is uniform, too; with gaussian, A is normal.
    """
    in_features, out_features = shape
    key_a, key_b = jax.random.split(key)
    if method == "gaussian":
        a = jax.random.normal(key_a, (in_features, rank), jnp.float32) / rank
    else:
        a = _uniform(key_a, (in_features, rank), in_features)
    if method is False:
        return a, _uniform(key_b, (rank, out_features), rank)
    return a, jnp.zeros((rank, out_features), jnp.float32)


def _uniform(key: Array, shape: tuple[int, int], fan_in: int) -> Array:
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _orthogonal_factors(
    key: Array, shape: tuple[int, ...], rank: int
) -> tuple[Array, Array]:
    """Returns A and B that are not zero, but whose product is.

    Each combines one half of the rows of an orthogonal matrix [R, R]: A the even ones, B
    the odd ones.
    """
    in_features, out_features = shape
    key_a, key_b = jax.random.split(key)
    square = jax.random.normal(jax.random.fold_in(key, 2), (rank, rank))
    rows = jnp.linalg.qr(square)[0]
    a = jax.random.normal(key_a, (in_features, rank // 2)) @ rows[0::2] / 10
    b = jax.random.normal(key_b, (out_features, rank // 2)) @ rows[1::2] / 10
    return a, b.T


def needs_residual_base(config: LoraConfig) -> bool:
    """Returns whether these are the settings of PiSSA or OLoRA."""
    return str(config.init_lora_weights).startswith(("pissa", "olora"))


@partial(jax.jit, static_argnums=0, static_argnames=("rank",))
def principal_factors(
    method: str, kernel: Any, key: Array, *, rank: int, scaling: Any
) -> tuple[Array, Array]:
    """Returns A [in, R] and B [R, out] so that scaling * (A B) approximates the kernel.

    Args:
        method: pissa (its largest singular values), pissa_niter_N (the same by N power
            iterations from random vectors) or olora (a part of its QR decomposition).
        kernel: [in, out]; computed with in float32.
        key: draws the random vectors.
        rank: R.
        scaling: of the adapter.
    """
    w = kernel.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        if method == "olora":  # PEFT's kernel is [out, in]: its columns are our rows
            q, r = jnp.linalg.qr(w.T)
            return r[:rank].T, q[:, :rank].T
        if method == "pissa":
            left, values, right = jnp.linalg.svd(w, full_matrices=False)
        else:
            iterations = int(method.removeprefix("pissa_niter_"))
            left, values, right = _randomised_svd(w, key, rank, iterations)
    root = jnp.sqrt(values[:rank] / scaling)
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _randomised_svd(
    w: Array, key: Array, rank: int, iterations: int
) -> tuple[Array, Array, Array]:
    """Source: Halko, Martinsson and Tropp (2011), algorithms 4.4 and 5.1."""
    basis = jnp.linalg.qr(w @ jax.random.normal(key, (w.shape[1], rank)))[0]
    for _ in range(iterations):
        other = jnp.linalg.qr(w.T @ basis)[0]
        basis = jnp.linalg.qr(w @ other)[0]
    left, values, right = jnp.linalg.svd(basis.T @ w, full_matrices=False)
    return basis @ left, values, right
