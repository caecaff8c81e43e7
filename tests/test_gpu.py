"""What only a GPU can show. To run it, and the golden files on the GPU:

JAX_PLATFORMS=cuda,cpu pytest tests/test_gpu.py tests/test_golden.py
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training_cases import (
    Run,
    adapted_params,
    equations,
    llama_config,
    moved,
)

import jlora
from jlora.config.llama_config import LlamaConfig
from jlora.config.lora_config import LoraConfig
from jlora.config.optim_config import OptimConfig
from jlora.config.rope_config import RopeParameters
from jlora.config.run_config import MeshConfig
from jlora.formats.digests import flatten
from jlora.lora.adapter_tree import join, split, trainable_mask
from jlora.ops.attention import attend
from jlora.ops.compute_choices import Compute
from jlora.parallel.sharding import make_mesh
from jlora.train.optimizer import make_optimizer, make_schedule
from jlora.train.step import TrainState, make_train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]


# Sizes that the kernels take.
WIDE = llama_config(
    hidden_size=512,
    intermediate_size=1024,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
)


def wide_params(*, use_dora: bool = False) -> Any:
    """Returns bfloat16 weights with adapters on all projections, away from their start."""
    lora = LoraConfig(r=16, target_modules="all-linear", use_dora=use_dora)
    return moved(adapted_params(WIDE, lora, dtype=jnp.bfloat16))


def value_and_gradients(function: Any, up: jax.Array, *arrays: jax.Array) -> Any:
    """Returns the function's result and its gradients along `up`, in up's dtype."""

    @jax.jit  # one compilation: op by op, a GPU compiles a hundred
    def run(*arrays: jax.Array) -> list[jax.Array]:
        out, pull = jax.vjp(function, *arrays)
        return [out, *pull(up)]

    return run(*(x.astype(up.dtype) for x in arrays))


def relative_error(found: jax.Array, wanted: jax.Array) -> float:
    wide = wanted.astype(jnp.float32)
    difference = found.astype(jnp.float32) - wide
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(wide))


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (6, 2)])
@pytest.mark.parametrize("length", [63, 64, 200, 1024])
def test_cudnn_attention_and_gradients_equal_float32_reference(
    heads: int, kv_heads: int, length: int
) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    counts = (heads, kv_heads, kv_heads, heads)
    q, k, v, up = (
        jax.random.normal(key, (2, length, n, 64), jnp.bfloat16)
        for key, n in zip(keys, counts, strict=True)
    )

    def run(attention, dtype):
        function = functools.partial(attend, compute=Compute(attention=attention))
        return value_and_gradients(function, up.astype(dtype), q, k, v)

    for found, wanted in zip(
        run("cudnn", jnp.bfloat16), run("xla", jnp.float32), strict=True
    ):
        assert relative_error(found, wanted) < 1e-2  # bfloat16; measured 3e-3


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

    def run(attention, dtype):
        compute = Compute(attention=attention, max_segments=max_segments)
        function = functools.partial(attend, compute=compute, segment_ids=segments)
        return value_and_gradients(function, up.astype(dtype), q, k, v)

    for found, wanted in zip(
        run("cudnn", jnp.bfloat16), run("xla", jnp.float32), strict=True
    ):
        assert relative_error(found, wanted) < 1e-2  # bfloat16; NaN fails


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

    jaxpr = jax.make_jaxpr(jax.grad(total))(params).jaxpr
    names = [e.primitive.name for e in equations(jaxpr)]
    forward = names.count("dot_product_attention_fwd_wrapper")
    assert forward == config.num_hidden_layers


@pytest.mark.parametrize(
    ("use_dora", "rate"), [(False, 0.0), (True, 0.0), (False, 0.2)]
)
@pytest.mark.parametrize("remat", ["minimal", "full", "offload"])
def test_fused_kernels_err_no_more_than_plain_bfloat16(
    remat: str, use_dora: bool, rate: float
) -> None:
    params = wide_params(use_dora=use_dora)
    trainable, frozen = split(params, trainable_mask(params))
    tokens = jax.random.randint(jax.random.key(0), (2, 256), 0, WIDE.vocab_size)

    def gradient(dtype: Any, kernels: str) -> Any:
        model = jlora.Llama(WIDE, dtype, "xla", remat, rate, kernels=kernels)

        def loss(trainable: Any, frozen: Any) -> Any:
            params, rngs = join(trainable, frozen), {"dropout": jax.random.key(2)}
            logits: Any = model.apply({"params": params}, tokens, rngs=rngs)
            return jnp.mean(jax.nn.log_softmax(logits[:, :-1])[..., 3])

        return jax.jit(jax.grad(loss))(trainable, frozen)

    wanted = jax.tree.leaves(gradient(jnp.float32, "xla"))
    plain = jax.tree.leaves(gradient(jnp.bfloat16, "xla"))
    fused = jax.tree.leaves(gradient(jnp.bfloat16, "hopper"))
    for exact, near, found in zip(wanted, plain, fused, strict=True):
        allowed = 2 * relative_error(near, exact) + 2e-3
        assert relative_error(found, exact) < allowed


@functools.cache
def first_step(
    mesh: MeshConfig, remat: str, kernels: str, dtype: Any
) -> tuple[dict[str, float], dict[str, jax.Array]]:
    """Returns a step's metrics, and Adam's first moments, which are the gradient's."""
    settings: Any = {"lora_dropout": 0.1, "remat": remat, "kernels": kernels}
    run = Run(mesh, config=WIDE, params=wide_params(), dtype=dtype, **settings)
    (metrics,) = run.train(1, length=64)
    moments = {k: v for k, v in flatten(run.state).items() if ".mu." in k}
    assert len(moments) == 14
    return metrics, {k: jnp.asarray(jax.device_get(v)) for k, v in moments.items()}


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two GPUs")
@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor", "context"])
@pytest.mark.parametrize("remat", ["minimal", "offload"])
def test_two_gpus_err_no_more_than_one(remat: str, axis: str) -> None:
    sizes: dict[str, Any] = {"data": 1} | {axis: 2}
    mesh = MeshConfig(**sizes)
    one = MeshConfig(data=1)
    exact, wanted = first_step(one, "minimal", "xla", jnp.float32)
    _, near = first_step(one, "minimal", "xla", jnp.bfloat16)
    metrics, found = first_step(mesh, remat, "hopper", jnp.bfloat16)
    alone, same = first_step(one, remat, "hopper", jnp.bfloat16)
    assert metrics["loss"] == pytest.approx(exact["loss"], rel=0.01)
    worst = max(relative_error(found[name], same[name]) for name in found)
    print(
        f"{axis}, {remat}: loss {metrics['loss']} {alone['loss']}, moments {worst:.1e}"
    )
    assert metrics["loss"] == pytest.approx(alone["loss"], rel=1e-3)
    for name, moment in wanted.items():
        allowed = 2 * relative_error(near[name], moment) + 2e-3
        assert relative_error(found[name], moment) < allowed, name


@pytest.mark.parametrize("remat", ["none", "minimal", "full", "offload"])
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
