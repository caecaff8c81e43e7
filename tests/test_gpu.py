"""What only a GPU can show. To run it, and the golden files on the GPU:

JAX_PLATFORMS=cuda,cpu pytest tests/test_gpu.py tests/test_golden.py
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.attention import attend
from jlora.config import LlamaConfig
from jlora.optimizer import make_optimizer, make_schedule
from jlora.rope_config import RopeParameters
from jlora.settings import MeshConfig, OptimConfig
from jlora.sharding import make_mesh
from jlora.training import TrainState, make_train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (6, 2)])
@pytest.mark.parametrize("length", [64, 200, 1024])
def test_cudnn_attention_and_gradients_equal_float32_reference(
    heads: int, kv_heads: int, length: int
) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    counts = (heads, kv_heads, kv_heads, heads)
    q, k, v, up = (
        jax.random.normal(key, (2, length, n, 64), jnp.bfloat16)
        for key, n in zip(keys, counts, strict=True)
    )

    def run(implementation, dtype):
        arrays = [x.astype(dtype) for x in (q, k, v)]
        out, pull = jax.vjp(
            lambda *a: attend(*a, implementation=implementation), *arrays
        )
        return [out, *pull(up.astype(dtype))]

    for found, wanted in zip(
        run("cudnn", jnp.bfloat16), run("xla", jnp.float32), strict=True
    ):
        difference = found.astype(jnp.float32) - wanted
        error = float(jnp.linalg.norm(difference) / jnp.linalg.norm(wanted))
        assert error < 1e-2  # bfloat16 operands; measured 3e-3


PACKED = np.zeros((2, 1024), np.int32)  # a full row, and one with a padded tail
PACKED[0] = np.repeat([1, 2, 3, 4, 5], [300, 17, 1, 500, 206])
PACKED[1, :964] = np.repeat([1, 2], [64, 900])


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (6, 2)])
@pytest.mark.parametrize("max_segments", [5, 16])
def test_cudnn_packed_attention_and_gradients_equal_float32_reference(
    heads: int, kv_heads: int, max_segments: int
) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    counts = (heads, kv_heads, kv_heads, heads)
    q, k, v, up = (
        jax.random.normal(key, (2, 1024, n, 64), jnp.bfloat16)
        for key, n in zip(keys, counts, strict=True)
    )
    segments = jnp.asarray(PACKED)

    def run(implementation, dtype):
        arrays = [x.astype(dtype) for x in (q, k, v)]
        out, pull = jax.vjp(
            lambda *a: attend(
                *a,
                segment_ids=segments,
                implementation=implementation,
                max_segments=max_segments,
            ),
            *arrays,
        )
        return [out, *pull(up.astype(dtype))]

    for found, wanted in zip(
        run("cudnn", jnp.bfloat16), run("xla", jnp.float32), strict=True
    ):
        difference = found.astype(jnp.float32) - wanted
        error = float(jnp.linalg.norm(difference) / jnp.linalg.norm(wanted))
        assert error < 1e-2  # bfloat16 operands; NaN fails


def test_flash_attention_runs_once_forward_in_a_train_step() -> None:
    shape = (2, 256, 4, 64)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_parameters=RopeParameters(1e4),
        max_position_embeddings=512,
    )
    model = jlora.Llama(config, jnp.bfloat16, "cudnn", "minimal")
    tokens = jnp.zeros(shape[:2], jnp.int32)
    start: Any = model.init(jax.random.key(0), tokens)
    params = jlora.add_lora(start["params"], jlora.LoraConfig(), jax.random.key(1))

    def total(params: Any) -> Any:
        logits: Any = model.apply({"params": params}, tokens)
        return logits.sum()

    text = str(jax.make_jaxpr(jax.grad(total))(params))
    assert text.count("dot_product_attention_fwd_wrapper[") == config.num_hidden_layers


@pytest.mark.parametrize("remat", ["none", "minimal", "full"])
def test_bfloat16_train_step_lowers_the_loss_and_keeps_the_base(remat: str) -> None:
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_parameters=RopeParameters(1e4),
        max_position_embeddings=512,
    )
    shapes = jax.eval_shape(
        jlora.Llama(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    )["params"]
    paths, treedef = jax.tree.flatten(shapes)
    leaves = [
        (0.05 * jax.random.normal(jax.random.key(i), leaf.shape)).astype(jnp.bfloat16)
        if leaf.ndim > 1
        else jnp.ones(leaf.shape, jnp.bfloat16)
        for i, leaf in enumerate(paths)
    ]
    base = jax.tree.unflatten(treedef, leaves)
    before = jax.tree.map(np.asarray, base)
    params = jlora.add_lora(base, jlora.LoraConfig(r=16), jax.random.key(1))
    model = jlora.Llama(config, jnp.bfloat16, "cudnn", remat)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    settings = OptimConfig(learning_rate=3e-3)
    optimizer = make_optimizer(settings, make_schedule(settings, 20))
    state, frozen = TrainState.create(params, optimizer, mesh)
    step = make_train_step(
        model, optimizer, mesh, state=state, frozen=frozen, packed=False
    )
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 1024, (4, 257), np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": np.ones((4, 256), np.float32),
        "segment_ids": np.ones((4, 256), np.int32),
        "positions": np.tile(np.arange(256, dtype=np.int32), (4, 1)),
    }
    losses = []
    for _ in range(20):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    print(f"{remat}: {losses[0]:.4f} to {losses[-1]:.4f}")
    assert losses[-1] < losses[0] - 0.1
    after = jax.tree.map(np.asarray, base)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
