"""A new adapter: which leaves a `LoraConfig` puts beside which weights, and their start.

Source: PEFT `tuners/lora/layer.py` (`reset_lora_parameters`, `orthogonal_init`,
`pissa_init`, `olora_init`), `utils/other.py` (`modules_to_save`, token rows); "PiSSA"
(Meng et al., 2024), "OLoRA" (Bueyuekakyuez, 2024).
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jlora.config.lora_config import LoraConfig
from jlora.errors import UnsupportedError, UsageError
from jlora.lora.adapter_tree import Params, is_adapter, modules, with_adapter
from jlora.lora.lora_dense import column_norms, norm_squared, weight_of
from jlora.lora.target_modules import TABLES, select
from jlora.ops.quantize import QUANTIZED_LEAVES, is_quantized, kernel_shape

EMBEDDING, HEAD = TABLES


def add_lora(params: Mapping[str, Any], config: LoraConfig, key: Array) -> Params:
    """Returns the tree with new adapter leaves beside what `config` selects.

    All new leaves are float32; the base's are shared, not copied. Each module draws from
    its own key, so targets do not influence each other.

    The tree holds no dropout rate: where `config.lora_dropout` is to act in a training
    loop of one's own, it is the model's, `model.clone(lora_dropout=rate)`, together with
    `rngs={"dropout": key}`. train.py does so itself.

    Raises:
        UsageError, UnsupportedError: as `select`; or adapters are there already.
    """
    refuse_training(config)
    found = modules(params)
    if any(is_adapter(leaf) for leaves in found.values() for leaf in leaves):
        raise UsageError("these parameters have an adapter already; merge it first")
    tied = HEAD not in found
    vocab = found[EMBEDDING]["embedding"].shape[0] if EMBEDDING in found else 0
    selection = select(config, list(found), tied=tied, vocab_size=vocab, strict=True)
    weight = partial(_weight, found)
    order = _order(list(found))
    leaves: dict[str, dict[str, Any]] = {name: {} for name in selection.names}
    for name, (rank, scaling) in selection.adapted.items():
        start = partial(
            _lookup_start if name == EMBEDDING else _linear_start,
            config,
            jax.random.fold_in(key, order[name]),
            rank=rank,
            scaling=scaling,
        )
        own = found.get(name, {})
        if is_quantized(own) and not _reads_weight(config):
            own = jax.ShapeDtypeStruct(kernel_shape(own), jnp.float32)
        else:
            own = weight(name)
        leaves[name] |= _with_magnitude(config, start(own), own)
    for name in selection.saved:
        for leaf, value in _saved(found, name).items():
            leaves[name][f"trained_{leaf}"] = value.astype(jnp.float32)
    for name, ids in selection.tokens.items():
        rows = weight(name) if name == EMBEDDING else weight(name).T
        index = jnp.asarray(ids, jnp.int32)
        leaves[name] |= {
            "token_ids": index,
            "token_rows": rows[index].astype(jnp.float32),
        }
    if selection.shared:
        leaves[HEAD] = {"lora_shared": jnp.float32(1)}
    return with_adapter(params, leaves)


def refuse_training(config: LoraConfig) -> None:
    """Raises UnsupportedError for settings that an adapter may come with, not be made by."""
    if config.bias != "none":
        raise UnsupportedError(
            f"lora.bias={config.bias!r}: jlora uses trained biases but does not train "
            "them; leave it at 'none', or name modules in lora.modules_to_save"
        )


def _order(names: list[str]) -> dict[str, int]:
    """Returns the number that each module's key is folded with."""
    layers = [name for name in names if name.endswith("_proj")]
    return {name: i for i, name in enumerate([*layers, HEAD, EMBEDDING])}


def _weight(found: dict[str, Params], name: str) -> Any:
    """Returns a module's weight; for a tied head, the table's transpose."""
    if name == HEAD and name not in found:
        return found[EMBEDDING]["embedding"].T
    return weight_of(found[name])


def _saved(found: dict[str, Params], name: str) -> Params:
    """Returns the leaves that a wholly trained module starts from."""
    own = found.get(name, {})
    if own and not is_quantized(own):
        return own
    rest = {leaf: value for leaf, value in own.items() if leaf not in QUANTIZED_LEAVES}
    return rest | {"kernel": _weight(found, name)}


def _reads_weight(config: LoraConfig) -> bool:
    start = config.init_lora_weights
    return config.use_dora or (
        isinstance(start, str) and start.startswith(("pissa", "olora"))
    )


def _lookup_start(
    config: LoraConfig, key: Array, table: Any, *, rank: int, scaling: float
) -> dict[str, Array]:
    """Returns the start of an embedding's adapter: A [V, R] zero, B [R, D] normal."""
    key_a, key_b = jax.random.split(key)
    vocab, width = table.shape
    a = jnp.zeros((vocab, rank), jnp.float32)
    if config.init_lora_weights is False:
        a = jax.random.normal(key_a, a.shape, jnp.float32)
    b = jax.random.normal(key_b, (rank, width), jnp.float32)
    return {"lora_A": a, "lora_B": b, "lora_scaling": jnp.float32(scaling)}


def _linear_start(
    config: LoraConfig, key: Array, kernel: Any, *, rank: int, scaling: float
) -> dict[str, Array]:
    """Returns the start of a linear layer's adapter, as `init_lora_weights` says."""
    start, shape = config.init_lora_weights, kernel.shape
    leaves = {"lora_scaling": jnp.float32(scaling)}
    if isinstance(start, str) and start.startswith(("pissa", "olora")):
        a, b = initial_pair(start, kernel, key, rank=rank, scaling=scaling)
        return leaves | {"lora_A": a, "lora_B": b, "lora_A0": a, "lora_B0": b}
    a, b = _random_pair(start, key, shape, rank)
    return leaves | {"lora_A": a, "lora_B": b}


def _random_pair(
    start: bool | str, key: Array, shape: tuple[int, ...], rank: int
) -> tuple[Array, Array]:
    in_features, out_features = shape
    key_a, key_b = jax.random.split(key)
    if start == "orthogonal":
        # The rows of an orthogonal matrix, shared out: A and B use those of the other's
        # complement, so that A B = 0 though neither is.
        half = rank // 2
        square = jax.random.normal(jax.random.fold_in(key, 2), (rank, rank))
        rows = jnp.linalg.qr(square)[0]
        a = jax.random.normal(key_a, (in_features, half)) @ rows[0::2] / 10
        b = jax.random.normal(key_b, (out_features, half)) @ rows[1::2] / 10
        return a, b.T
    if start == "gaussian":
        a = jax.random.normal(key_a, (in_features, rank), jnp.float32) / rank
    else:
        a = _uniform(key_a, (in_features, rank), in_features)
    if start is False:
        return a, _uniform(key_b, (rank, out_features), rank)
    return a, jnp.zeros((rank, out_features), jnp.float32)


def _uniform(key: Array, shape: tuple[int, int], fan_in: int) -> Array:
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


@partial(jax.jit, static_argnums=0, static_argnames=("rank",))
def initial_pair(
    start: str, kernel: Any, key: Array, *, rank: int, scaling: Any
) -> tuple[Array, Array]:
    """Returns (A [in, R], B [R, out]) whose update s A B is the kernel's main part.

    Args:
        start: pissa (singular vectors), pissa_niter_N (found by N power iterations from
            random vectors) or olora (the first columns of an orthogonal basis).
        kernel: [in, out]; the factors are those of its float32 form.
        key: of the random vectors.
        rank: R.
        scaling: s.
    """
    w = kernel.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        if start == "olora":  # of PEFT's [out, in], whose columns are our rows
            q, r = jnp.linalg.qr(w.T)
            return r[:rank].T, q[:, :rank].T
        if start == "pissa":
            left, values, right = jnp.linalg.svd(w, full_matrices=False)
        else:
            iterations = int(start.removeprefix("pissa_niter_"))
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


def _with_magnitude(
    config: LoraConfig, leaves: dict[str, Array], weight: Any
) -> dict[str, Array]:
    """Returns the leaves and, for DoRA, its own: the magnitude starts at the norm."""
    if not config.use_dora:
        return leaves
    leaves |= {"lora_norm_squared": norm_squared(weight)}
    return leaves | {"lora_magnitude": column_norms({**leaves, "kernel": weight})}
