import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training_cases import (
    ALL_LINEAR,
    CONFIG,
    LENGTH,
    MESHES,
    ROWS,
    Run,
    adapted_params,
    equations,
    llama_config,
    ragged_batch,
)
from jax.sharding import PartitionSpec

from jlora.config.run_config import MeshConfig
from jlora.formats.digests import flatten

STEPS = 2
# Of layers that tensor splits, the compiler partitions those with DoRA.
DORA = replace(ALL_LINEAR, use_dora=True)


@functools.cache
def trained(mesh, grad_accum_steps=1, layers=1, length=LENGTH):
    run = Run(
        MeshConfig(*mesh),
        config=llama_config(num_hidden_layers=layers),
        grad_accum_steps=grad_accum_steps,
    )
    metrics = run.train(STEPS, length)
    adapters = {name: np.asarray(x) for name, x in flatten(run.state.trainable).items()}
    return metrics, adapters


def assert_same_training(found, expected):
    # Sums in another order, in float32: measured 2e-7 at most, adapters and metrics.
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, adapter in found[1].items():
        np.testing.assert_allclose(
            adapter, expected[1][name], rtol=0, atol=1e-6, err_msg=name
        )


def test_the_batches_are_ragged():
    batches = [ragged_batch(step) for step in range(STEPS)]
    for batch in batches:
        supervised = batch["loss_mask"].sum(1)
        assert (supervised == 0).sum() >= 4
        assert len(set(supervised)) >= 4
        # Neither equal devices nor equal parts of an accumulated batch.
        assert len(set(supervised.reshape(8, -1).sum(1))) > 1
        assert len(set(supervised.reshape(-1, 4).sum(0))) > 1
        assert (batch["segment_ids"] == 0).any()
        assert (batch["segment_ids"] == 2).any(1).all()


def test_training_moves_the_adapters_by_far_more_than_the_tolerance():
    initial = flatten(adapted_params(llama_config(num_hidden_layers=1)))
    _, adapters = trained((1, 1, 1))
    for name, adapter in adapters.items():
        assert np.abs(adapter - initial[name]).max() > 1e-3


def test_there_are_ten_meshes_of_eight_devices():
    assert len(MESHES) == len(jax.devices()) + 2 == 10


@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_train_as_one_does(mesh):
    assert_same_training(trained(mesh), trained((1, 1, 1)))


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_four_accumulated_parts_train_as_one_does(mesh):
    assert_same_training(trained(mesh, grad_accum_steps=4), trained((1, 1, 1)))


def test_two_layers_on_every_axis_train_as_on_one_device():
    found, expected = (trained(mesh, layers=2) for mesh in ((2, 2, 2), (1, 1, 1)))
    assert_same_training(found, expected)


@pytest.mark.parametrize(
    "mesh",
    [
        (1, 1, 1, 2),
        (1, 1, 1, 8),
        (2, 1, 1, 4),
        (1, 4, 1, 2),
        (1, 1, 2, 4),
        (1, 2, 2, 2),
    ],
)
def test_devices_that_split_the_tokens_of_rows_train_as_one_does(mesh):
    found, expected = (trained(sizes, length=16) for sizes in (mesh, (1, 1, 1)))
    assert_same_training(found, expected)


def is_sum(equation):
    return equation.primitive.name.startswith("psum")


def test_devices_with_all_weights_add_float32_gradients_once_for_all_parts():
    run = Run(MeshConfig(8), dtype=jnp.bfloat16, grad_accum_steps=4)
    jaxpr = run.step.trace(run.state, run.frozen, ragged_batch()).jaxpr.jaxpr
    every = list(equations(jaxpr))
    scans = [e.params["jaxpr"].jaxpr for e in every if e.primitive.name == "scan"]
    in_scans = [e for scan in scans for e in equations(scan)]
    added, again = (
        [value.aval.dtype for e in found for value in e.invars]
        for found in ([e for e in part if is_sum(e)] for part in (every, in_scans))
    )
    loss_and_adapters = 1 + len(jax.tree.leaves(run.state.trainable))
    assert added == [jnp.float32] * loss_and_adapters
    assert scans
    assert not again


@pytest.fixture(scope="module")
def run():
    return Run(MeshConfig(2, 2, 2))


def test_every_leaf_is_on_all_devices(run):
    for name, leaf in flatten({"state": run.state, "frozen": run.frozen}).items():
        assert len(leaf.sharding.device_set) == 8, name


@pytest.mark.parametrize("part", ["trainable.", "mu.", "nu."])
def test_adapters_and_their_moments_live_where_their_kernel_does(run, part):
    leaves = {
        name: leaf
        for name, leaf in flatten(run.state).items()
        if f"{part}layers.0.self_attn.q_proj.lora_" in name
    }
    specs = {name.rsplit(".")[-1]: leaf.sharding.spec for name, leaf in leaves.items()}
    layers = () if part == "trainable." else (None,)  # moments: of all layers
    assert specs["lora_A"] == PartitionSpec(*layers, "fsdp", None)
    assert specs["lora_B"] == PartitionSpec(*layers, None, "tensor")


def test_a_step_keeps_every_leaf_where_it_was(run):
    before = jax.tree.map(lambda x: x.sharding, run.state)
    run.train(1)
    assert jax.tree.map(lambda x: x.sharding, run.state) == before


def constraints(text):
    """Shapes and shardings of the activation constraints in lowered code."""
    pattern = r"sdy\.sharding_constraint.*?<@\w+, (\[.*?\])>.*?tensor<([\dx]+)xf32>"
    return {(shape, axes) for axes, shape in re.findall(pattern, text)}


def test_activation_constraints_reach_the_compiler_where_it_partitions_a_step():
    params = adapted_params(llama_config(num_hidden_layers=1), DORA)
    run = Run(MeshConfig(2, 2, 2), params=params)
    lowered = run.step.lower(run.state, run.frozen, ragged_batch())
    found = constraints(lowered.as_text())
    rows = '{"data", "fsdp"}'
    assert {
        ("32x10x32", f'[{rows}, {{"context"}}, {{}}]'),
        ("32x10x16x4", f'[{rows}, {{"context"}}, {{"tensor"}}, {{}}]'),
        ("32x10x48", f'[{rows}, {{"context"}}, {{"tensor"}}]'),
    } <= found


def test_compiled_code_holds_no_whole_activation(run):
    compiled = run.step.lower(run.state, run.frozen, ragged_batch()).compile()
    found = set(re.findall(r"f32\[(32|8),10,(\d+)", compiled.as_text()))
    assert ("8", "24") in found  # gate and up, split over rows and tensor
    assert not {size for rows, size in found if rows == "32"}


def test_the_state_is_donated(run):
    old = run.state
    run.train(1)
    for name, leaf in flatten({"a": old.trainable, "b": old.opt_state}).items():
        assert leaf.is_deleted(), name


def test_the_frozen_weights_are_not_donated(run):
    run.train(1)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(run.frozen))


def test_creating_a_state_leaves_the_given_parameters_alive():
    params = adapted_params(llama_config(num_hidden_layers=1))
    Run(params=params).train(1)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_one_compilation_serves_all_batches(run):
    run.train(3)
    assert run.step._cache_size() == 1


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("embed_tokens.embedding", ("tensor", "fsdp")),
        ("layers.0.self_attn.q_proj.kernel", ("fsdp", "tensor")),
        ("layers.0.self_attn.o_proj.kernel", (("tensor", "fsdp"), None)),
        ("layers.0.mlp.gate_proj.kernel", ("fsdp", "tensor")),
        ("layers.0.mlp.down_proj.kernel", (("tensor", "fsdp"), None)),
        ("lm_head.kernel", ("fsdp", "tensor")),
        ("norm.scale", (None,)),
    ],
)
def test_frozen_weights_are_split(run, name, spec):
    assert flatten(run.frozen)[name].sharding.spec == PartitionSpec(*spec)


def test_no_size_of_the_config_is_that_of_a_batch():
    assert ROWS * 10 not in CONFIG.values()
