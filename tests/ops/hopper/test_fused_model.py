"""A model with fused projections against the plain one, on one device and on several."""

import functools
from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training_cases import (
    ALL_LINEAR,
    Run,
    adapted_params,
    equations,
    llama_config,
    moved,
    quantized,
    ragged_batch,
)

from jlora.config.lora_config import LoraConfig
from jlora.config.run_config import MeshConfig
from jlora.formats.digests import flatten
from jlora.lora.adapter_tree import (
    is_trainable,
    join,
    map_leaves,
    split,
    trainable_mask,
)
from jlora.model.llama import Llama
from jlora.parallel.sharding import make_mesh, tree_shardings
from jlora.train.evaluation import make_eval_step

ONE_LAYER = llama_config(num_hidden_layers=1)


def loss_and_gradient(use_dora: bool, rate: float, stored: str, **options: Any) -> Any:
    config = llama_config()
    params = adapted_params(config, replace(ALL_LINEAR, use_dora=use_dora))
    params = moved(quantized(params) if stored == "nf4" else params)
    tokens = jax.random.randint(jax.random.key(0), (2, 5), 0, config.vocab_size)
    model = Llama(config, lora_dropout=rate, **options)

    def loss(params: Any) -> jax.Array:
        rngs = {"dropout": jax.random.key(3)}
        logits: Any = model.apply({"params": params}, tokens, rngs=rngs)
        return jnp.mean(jax.nn.log_softmax(logits)[..., 3])

    return jax.jit(jax.value_and_grad(loss, allow_int=True))(params)


plain_loss_and_gradient = functools.cache(loss_and_gradient)


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize("remat", ["minimal", "full"])
@pytest.mark.parametrize(
    ("use_dora", "rate", "stored"),
    [
        (False, 0.0, "float32"),
        (True, 0.0, "float32"),
        (False, 0.3, "float32"),
        (False, 0.0, "nf4"),
        (True, 0.0, "nf4"),
        (False, 0.3, "nf4"),
    ],
)
def test_fused_model_equals_the_plain_one(
    remat: str, use_dora: bool, rate: float, stored: str
) -> None:
    expected, expected_gradient = plain_loss_and_gradient(use_dora, rate, stored)
    found, gradient = loss_and_gradient(
        use_dora, rate, stored, remat=remat, kernels="hopper"
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for (path, a), (_, b) in zip(
        jax.tree_util.tree_leaves_with_path(gradient),
        jax.tree_util.tree_leaves_with_path(expected_gradient),
        strict=True,
    ):
        if is_trainable(path[-1].key):
            # Some masks leave sums that cancel: 1.4e-5 of the largest over six keys.
            atol = 2e-5 * np.abs(b).max() if rate else 1e-5
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)


@pytest.mark.parametrize(
    ("lora", "rate", "swiglu"),
    [
        (ALL_LINEAR, 0.0, "swiglu_and_lora_gradients"),
        (ALL_LINEAR, 0.1, "swiglu_and_lora_gradients"),
        (replace(ALL_LINEAR, use_dora=True), 0.0, None),
        (LoraConfig(r=2), 0.0, "swiglu_gradients"),
    ],
)
@pytest.mark.parametrize("remat", ["none", "minimal"])
def test_no_kernel_runs_twice_in_a_gradient(
    remat: str, lora: LoraConfig, rate: float, swiglu: str | None
) -> None:
    config = llama_config(
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
    )
    params = adapted_params(config, lora, dtype=jnp.bfloat16)
    trainable, frozen = split(params, trainable_mask(params))
    model = Llama(
        config, jnp.bfloat16, remat=remat, lora_dropout=rate, kernels="hopper"
    )

    def total(trainable: Any) -> jax.Array:
        tokens = jnp.zeros((1, 256), jnp.int32)
        params, rngs = join(trainable, frozen), {"dropout": jax.random.key(2)}
        logits: Any = model.apply({"params": params}, tokens, rngs=rngs)
        return logits.sum()

    jaxpr = jax.make_jaxpr(jax.grad(total))(trainable).jaxpr
    count = Counter(e.params.get("name") for e in equations(jaxpr))
    # A layer has 4 forward and 4 backward. The input of the first layer needs no gradient,
    # but only the compiler drops that product.
    forward = count["sum_of_products"] + count["swiglu_forward"]
    assert forward + count["swiglu_gradients"] == 16
    for name in ("swiglu_and_lora_gradients", "swiglu_gradients"):
        assert count[name] == (2 if name == swiglu else 0)


@functools.cache
def metrics_and_moments(mesh: MeshConfig, kernels: str, **settings: Any) -> Any:
    params = moved(adapted_params(ONE_LAYER))
    run = Run(mesh, params=params, kernels=kernels, **settings)
    metrics = run.train(2)
    # Moments are sums of gradients. Adapters would show the rounding of small gradients,
    # as AdamW divides by them.
    moments = {k: v for k, v in flatten(run.state).items() if ".mu." in k}
    assert len(moments) == len(jax.tree.leaves(run.state.trainable))
    return metrics, moments


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize("remat", ["none", "minimal", "offload"])
@pytest.mark.parametrize("settings", [{"lora_dropout": 0.3}, {"grad_accum_steps": 4}])
def test_devices_with_all_weights_and_own_rows_train_as_one(
    remat: str, settings: dict[str, Any]
) -> None:
    metrics, moments = metrics_and_moments(
        MeshConfig(8), "hopper", remat=remat, **settings
    )
    for mesh, kernels in ((MeshConfig(1), "hopper"), (MeshConfig(2, 2, 2), "xla")):
        expected, same = metrics_and_moments(mesh, kernels, remat="none", **settings)
        for found, wanted in zip(metrics, expected, strict=True):
            assert found == pytest.approx(wanted, rel=2e-6)
        for name, moment in moments.items():
            atol = 3e-5 * np.abs(same[name]).max()  # measured 1e-5
            np.testing.assert_allclose(
                moment, same[name], rtol=0, atol=atol, err_msg=name
            )


# Sizes of which each of four devices has whole blocks of nf4, and layers in succession.
BLOCKS = llama_config(
    num_hidden_layers=3, hidden_size=128, intermediate_size=256, head_dim=16
)


@functools.cache
def trained_with_nf4(mesh: MeshConfig, remat: str) -> Any:
    # Smaller weights than those of small models, or rounding would grow layer by layer.
    params = map_leaves(
        lambda path, leaf: 0.3 * leaf if path[-1] == "kernel" else leaf,
        adapted_params(BLOCKS),
    )
    params = moved(quantized(params))
    settings: Any = {"lora_dropout": 0.3, "grad_accum_steps": 2, "kernels": "hopper"}
    run = Run(mesh, config=BLOCKS, params=params, remat=remat, **settings)
    metrics = run.train(1)  # AdamW would make small gradients' rounding large
    return metrics, {k: v for k, v in flatten(run.state).items() if ".mu." in k}


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize(
    ("remat", "sizes"),
    [
        ("minimal", (2, 2, 1)),
        ("offload", (2, 2, 1)),
        ("minimal", (1, 1, 2)),
        ("full", (1, 2, 2)),
        ("minimal", (2, 1, 2, 2)),
        ("offload", (1, 2, 1, 2)),
    ],
)
def test_devices_that_split_quantised_weights_train_as_one(
    remat: str, sizes: Any
) -> None:
    metrics, moments = trained_with_nf4(MeshConfig(*sizes), remat)
    expected, same = trained_with_nf4(MeshConfig(1), "none")
    for found, wanted in zip(metrics, expected, strict=True):
        assert found == pytest.approx(wanted, rel=2e-5)
    for name, moment in moments.items():
        # Measured 9.4e-5; on one device an embedding of the next float32 numbers gives as much.
        atol = 2e-4 * np.abs(same[name]).max()
        np.testing.assert_allclose(moment, same[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (1, 2, 4), (2, 1, 1, 2)])
def test_devices_with_own_rows_evaluate_as_one(sizes: Any) -> None:
    params, batch, found = moved(adapted_params(ONE_LAYER)), ragged_batch(), []
    for config, kernels in ((MeshConfig(*sizes), "hopper"), (MeshConfig(1), "xla")):
        devices = config.data * config.fsdp * config.tensor * config.context
        mesh = make_mesh(config, jax.devices()[:devices])
        step = make_eval_step(Llama(ONE_LAYER, kernels=kernels), mesh, params=params)
        jaxpr = step.trace(params, batch).jaxpr.jaxpr
        names = {equation.primitive.name for equation in equations(jaxpr)}
        # The compiler could split the plain products used here, but not the kernels.
        assert ("shard_map" in names) == (devices > 1)
        placed = jax.device_put(params, tree_shardings(mesh, params))
        found.append([float(x) for x in step(placed, batch)])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
