"""The TPU's kernel, interpreted: against the float32 reference, alone and on a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training_cases import adapted_params, llama_config, ragged_batch

from jlora.config.run_config import MeshConfig
from jlora.lora.adapter_tree import join, split, trainable_mask
from jlora.model.llama import Llama
from jlora.ops.attention import attend
from jlora.ops.compute_choices import Compute
from jlora.parallel.sharding import batch_sharding, make_mesh, tree_shardings, use_mesh
from jlora.train.evaluation import make_eval_step
from jlora.train.step import summed_loss

SEGMENTS = np.zeros((2, 200), np.int32)  # a full row, and one with a padded tail
SEGMENTS[0] = np.repeat([1, 2, 3], [70, 100, 30])
SEGMENTS[1, :150] = np.repeat([1, 2], [50, 100])
# Three blocks of the kernel: documents end inside of each, and one spans all three.
LONG = np.zeros((2, 301), np.int32)
LONG[0] = np.repeat([1, 2, 3, 4], [60, 90, 111, 40])
LONG[1, :299] = np.repeat([1, 2], [5, 294])
NAMES = ("output", "dq", "dk", "dv")


def with_gradients(
    attention: str, segment_ids: Any, length: int, kv_heads: int, head_dim: int
):
    keys = jax.random.split(jax.random.key(0), 4)
    counts = (4, kv_heads, kv_heads, 4)
    q, k, v, up = (
        jax.random.normal(key, (2, length, n, head_dim))
        for key, n in zip(keys, counts, strict=True)
    )

    @jax.jit
    def run(q, k, v, up):
        out, pull = jax.vjp(
            lambda q, k, v: attend(
                q, k, v, Compute(attention=attention), segment_ids=segment_ids
            ),
            *(q, k, v),
        )
        return [out, *pull(up)]

    return dict(zip(NAMES, run(q, k, v, up), strict=True))


@pytest.mark.parametrize(
    ("segment_ids", "length", "kv_heads", "head_dim"),
    [
        (None, 200, 4, 64),
        (None, 301, 2, 128),
        (SEGMENTS, 200, 2, 64),
        (LONG, 301, 1, 16),
        (np.ones((2, 1), np.int32), 1, 2, 64),
    ],
    ids=[
        "dense",
        "dense grouped, blocks",
        "packed grouped",
        "packed one key head, blocks",
        "one token",
    ],
)
def test_splash_and_its_gradients_equal_the_reference(
    segment_ids, length, kv_heads, head_dim
):
    given = None if segment_ids is None else jnp.asarray(segment_ids)
    found = with_gradients("splash", given, length, kv_heads, head_dim)
    wanted = with_gradients("xla", given, length, kv_heads, head_dim)
    for name in NAMES:
        # Float32 sums in blocks: measured 6e-6 on gradients of size 5.
        np.testing.assert_allclose(
            found[name], wanted[name], rtol=0, atol=2e-5, err_msg=name
        )


def test_changing_one_segment_leaves_the_others_bit_identical():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 200, 2, 32)) for i in range(3))
    run = jax.jit(
        lambda q, k, v: attend(
            q, k, v, Compute(attention="splash"), segment_ids=jnp.asarray(SEGMENTS)
        )
    )
    first = jnp.asarray(SEGMENTS == 1)[..., None, None]
    before, after = run(q, k, v), run(*(jnp.where(first, 3 - x, x) for x in (q, k, v)))
    others = SEGMENTS > 1
    np.testing.assert_array_equal(before[others], after[others])
    assert (before[SEGMENTS == 1] != after[SEGMENTS == 1]).any()


def test_devices_with_own_rows_run_the_kernel_apart():
    config, batch, found = llama_config(num_hidden_layers=1), ragged_batch(rows=4), []
    params = adapted_params(config)
    for devices, attention in ((2, "splash"), (1, "xla")):
        mesh = make_mesh(MeshConfig(devices), jax.devices()[:devices])
        model = Llama(config, attention=attention)
        step = make_eval_step(model, mesh, params=params)
        found.append([float(x) for x in step(params, batch)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def loss_and_gradient(mesh_config: MeshConfig, attention: str):
    size = mesh_config.data * mesh_config.fsdp * mesh_config.tensor
    mesh = make_mesh(mesh_config, jax.devices()[:size])
    config = llama_config(num_hidden_layers=1)
    params = adapted_params(config)
    trainable, frozen = split(params, trainable_mask(params))
    frozen = jax.device_put(frozen, tree_shardings(mesh, frozen))
    batch = jax.device_put(ragged_batch(rows=4), batch_sharding(mesh))

    @jax.jit
    def run(trainable, frozen, batch):
        def loss(trainable):
            params = join(trainable, frozen)
            model = Llama(config, attention=attention)
            return summed_loss(model, params, batch, packed=True, chunk=8)

        with use_mesh(mesh):
            return jax.value_and_grad(loss)(trainable)

    return jax.device_get(run(trainable, frozen, batch))


@pytest.mark.slow
def test_packed_model_with_splash_on_a_mesh_equals_the_reference_on_one_device():
    found = loss_and_gradient(MeshConfig(data=2, fsdp=2, tensor=2), "splash")
    wanted = loss_and_gradient(MeshConfig(data=1), "xla")
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-5)
