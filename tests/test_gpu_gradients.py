"""Gradients on a GPU, leaf by leaf, against float32: every stored format and remat.

JAX_PLATFORMS=cuda,cpu pytest tests/test_gpu_gradients.py
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training_cases import llama_config, moved

import jlora
from jlora.lora.adapter_tree import Params, join, map_leaves, split, trainable_mask
from jlora.model.remat import layer_memory
from jlora.ops.quantize import kernel_of, quantize_kernel
from jlora.train.compiler_options import COMPILER_OPTIONS
from jlora.train.step import summed_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]

CONFIG = llama_config(
    vocab_size=4096,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=128,
    max_position_embeddings=8192,
)
FORMATS = ("none", "int8", "fp8", "nf4")
# Two layers of an 8B model at bfloat16: at most 0.046 in any leaf, whatever the format,
# the number of tokens and the remat; quantised weights are exact in both.
ALLOWED = 0.06
# Where activations and gradients are rounded to codes as well.
ALLOWED_OF_CODES = {"fp8": 0.25, "int8": 0.12}


def random_base(stored: str) -> Params:
    """Returns random weights, the projections truly quantised.

    Random codes would not do: those of nf4 have a mean above 0, so that every matrix has
    one large singular value, and rounding alone then changes gradients by half.
    """
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes: Any = jax.eval_shape(jlora.Llama(CONFIG).init, jax.random.key(0), tokens)
    rng = np.random.default_rng(0)

    def fill(tree: Params) -> Params:
        found: Params = {}
        for name, leaf in tree.items():
            if isinstance(leaf, dict):
                found[name] = fill(leaf)
            elif name == "scale":
                found[name] = jnp.ones(leaf.shape, jnp.bfloat16)
            else:
                weight = 0.02 * rng.standard_normal(leaf.shape, np.float32)
                is_projection = name == "kernel" and CONFIG.vocab_size not in leaf.shape
                if stored != "none" and is_projection:
                    quantized = quantize_kernel(weight, stored)  # type: ignore[arg-type]
                    found |= {key: jnp.asarray(x) for key, x in quantized.items()}
                else:
                    found[name] = jnp.asarray(weight, jnp.bfloat16)
        return found

    return fill(shapes["params"])


programs: list[str] = []
"""The HLO of every gradient that was computed."""


@functools.cache
def adapted(stored: str) -> tuple[Params, Params]:
    """Returns (trainable, frozen), the adapters away from their initial values."""
    lora = jlora.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
    params = moved(jlora.add_lora(random_base(stored), lora, jax.random.key(1)))
    return split(params, trainable_mask(params))


def dequantised(tree: Params) -> Params:
    """Returns the tree in float32, the kernels that the codes stand for in their place."""
    found = {
        name: dequantised(leaf) if isinstance(leaf, dict) else leaf.astype(jnp.float32)
        for name, leaf in tree.items()
        if not name.startswith("kernel_")
    }
    if "kernel_q" in tree:
        found["kernel"] = kernel_of(tree, jnp.float32)
    return found


def gradient(
    frozen: Params, stored: str, length: int, dtype: Any, merger_mb: int | None = None
) -> Any:
    """Returns a function of the model's settings that gives every leaf's gradient."""
    trainable, _ = adapted(stored)
    tokens = jax.random.randint(jax.random.key(2), (1, length + 1), 0, 4096)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": jnp.ones((1, length)),
        "positions": jnp.arange(length)[None],
    }
    options: Any = dict(COMPILER_OPTIONS["gpu"])
    if merger_mb is not None:
        options["xla_gpu_dot_merger_threshold_mb"] = merger_mb

    def run(**settings: Any) -> dict[str, np.ndarray]:
        model = jlora.Llama(CONFIG, dtype, **settings)

        def loss(trainable: Params, frozen: Params) -> Any:
            params = join(trainable, frozen)
            return summed_loss(model, params, batch, packed=False, chunk=1024) / length

        step = jax.jit(jax.grad(loss), compiler_options=options)
        compiled = step.lower(trainable, frozen).compile()
        programs.append(compiled.as_text() or "")
        found = compiled(trainable, frozen)
        named: dict[str, np.ndarray] = {}
        map_leaves(
            lambda path, leaf: named.update({"/".join(path): np.asarray(leaf)}), found
        )
        return named

    return run


@functools.cache
def reference(stored: str, length: int) -> dict[str, np.ndarray]:
    """Returns the gradients in float32, of the dequantised weights."""
    frozen = dequantised(adapted(stored)[1])
    with jax.default_matmul_precision("highest"):
        return gradient(frozen, stored, length, jnp.float32)(remat="full")


def check(
    found: dict[str, np.ndarray], stored: str, length: int, allowed: float = ALLOWED
) -> None:
    wanted = reference(stored, length)
    assert found.keys() == wanted.keys()
    errors = {
        name: float(np.linalg.norm(found[name] - x) / np.linalg.norm(x))
        for name, x in wanted.items()
    }
    worst = max(errors, key=errors.__getitem__)
    print(f"{stored}, {length} tokens: {errors[worst]:.4f} in {worst}")
    assert len(errors) == 28
    assert all(error < allowed for error in errors.values()), (worst, errors[worst])


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize(
    ("length", "remat"),
    [
        (512, "minimal"),
        (2048, "none"),
        (2048, "minimal"),
        (2048, "full"),
        (2048, "offload"),
        (8192, "minimal"),
    ],
)
def test_gradients_of_every_format_equal_float32(
    stored: str, length: int, remat: str
) -> None:
    run = gradient(adapted(stored)[1], stored, length, jnp.bfloat16)
    check(run(attention="cudnn", remat=remat), stored, length)


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize(
    ("length", "remat"), [(512, "full"), (2048, "minimal"), (2048, "offload")]
)
def test_gradients_of_the_fused_kernels_equal_float32(
    stored: str, length: int, remat: str
) -> None:
    run = gradient(adapted(stored)[1], stored, length, jnp.bfloat16)
    check(run(attention="cudnn", remat=remat, kernels="hopper"), stored, length)


@pytest.mark.parametrize("stored", ["fp8", "int8"])
@pytest.mark.parametrize("kernels", ["xla", "hopper"])
@pytest.mark.parametrize(("length", "remat"), [(512, "full"), (2048, "minimal")])
def test_gradients_of_products_of_codes_nearly_equal_float32(
    stored: str, length: int, remat: str, kernels: str
) -> None:
    run = gradient(adapted(stored)[1], stored, length, jnp.bfloat16)
    codes = ("fp8", "int8")
    found = run(attention="cudnn", remat=remat, kernels=kernels, code_products=codes)
    check(found, stored, length, allowed=ALLOWED_OF_CODES[stored])
    # Nothing is as large as a dequantised kernel of the MLP, except for its codes.
    wide = f"bf16[{CONFIG.hidden_size},{CONFIG.intermediate_size}]"
    assert wide not in programs[-1]


@pytest.mark.parametrize("kernels", ["xla", "hopper"])
@pytest.mark.parametrize("remat", ["full", "offload"])
def test_gradients_of_the_mlp_in_pieces_equal_float32(
    monkeypatch: pytest.MonkeyPatch, remat: str, kernels: str
) -> None:
    monkeypatch.setattr(layer_memory, "_PIECE_SIZE", 512 * CONFIG.intermediate_size)
    run = gradient(adapted("nf4")[1], "nf4", 2048, jnp.bfloat16)
    check(run(attention="cudnn", remat=remat, kernels=kernels), "nf4", 2048)


@pytest.mark.parametrize("stored", ["none", "nf4"])
def test_gradients_without_xlas_dot_merger_equal_float32(stored: str) -> None:
    run = gradient(adapted(stored)[1], stored, 2048, jnp.bfloat16, merger_mb=0)
    check(run(attention="cudnn", remat="minimal"), stored, 2048)
