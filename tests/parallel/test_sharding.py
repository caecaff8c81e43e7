import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training_cases import (
    ALL_LINEAR,
    CONFIG,
    ROWS,
    Run,
    adapted_params,
    equations,
    llama_config,
    ragged_batch,
    shapes,
)
from jax.sharding import PartitionSpec

import jlora
from jlora.config.run_config import MeshConfig
from jlora.errors import UsageError
from jlora.formats.digests import flatten
from jlora.lora.adapter_tree import count_parameters
from jlora.lora.initialisation import add_lora
from jlora.parallel.sharding import (
    KERNEL_AXES,
    MESH_AXES,
    RULES,
    check_divisible,
    make_mesh,
    tree_shardings,
    use_mesh,
)

# Every (data, fsdp, tensor) whose product is 8.
MESHES = [
    (data, fsdp, 8 // (data * fsdp))
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    if data * fsdp <= 8
]
STEPS = 2


@functools.cache
def trained(mesh, grad_accum_steps=1, layers=1):
    run = Run(
        MeshConfig(*mesh),
        config=llama_config(num_hidden_layers=layers),
        grad_accum_steps=grad_accum_steps,
    )
    metrics = run.train(STEPS)
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


def test_the_data_are_ragged():
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
    start = flatten(adapted_params(llama_config(num_hidden_layers=1)))
    _, adapters = trained((1, 1, 1))
    for name, adapter in adapters.items():
        assert np.abs(adapter - start[name]).max() > 1e-3


def test_there_are_ten_meshes_of_eight_devices():
    assert len(MESHES) == len(jax.devices()) + 2 == 10


@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_train_as_one(mesh):
    assert_same_training(trained(mesh), trained((1, 1, 1)))


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_four_accumulated_parts_train_as_one(mesh):
    assert_same_training(trained(mesh, grad_accum_steps=4), trained((1, 1, 1)))


def test_two_layers_on_every_axis_train_as_on_one_device():
    found, expected = (trained(mesh, layers=2) for mesh in ((2, 2, 2), (1, 1, 1)))
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


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("embed_tokens.embedding", ("tensor", "fsdp")),
        ("layers.0.self_attn.q_proj.kernel", ("fsdp", "tensor")),
        ("layers.0.self_attn.o_proj.kernel", ("tensor", "fsdp")),
        ("layers.0.mlp.gate_proj.kernel", ("fsdp", "tensor")),
        ("layers.0.mlp.down_proj.kernel", ("tensor", "fsdp")),
        ("lm_head.kernel", ("fsdp", "tensor")),
        ("norm.scale", (None,)),
    ],
)
def test_frozen_weights_are_split(run, name, spec):
    assert flatten(run.frozen)[name].sharding.spec == PartitionSpec(*spec)


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


def test_every_logical_axis_in_use_has_a_rule():
    files = Path(jlora.__file__).parent.rglob("*.py")
    code = "\n".join(file.read_text("utf-8") for file in files)
    groups = re.findall(r"with_logical_constraint\([^()]*\(([^()]*)\)", code)
    assert len(groups) == code.count("nn.with_logical_constraint(")
    named = {name for group in groups for name in re.findall(r"\"(\w+)\"", group)}
    assert {"batch", "length", "act_embed", "act_heads", "act_mlp", "vocab"} <= named
    in_kernels = {name for axes in KERNEL_AXES.values() for name in axes}
    assert (named | in_kernels) - {name for name, _ in RULES} == set()


def test_rules_name_mesh_axes_only():
    axes = {axis for _, rule in RULES for axis in np.atleast_1d(rule or ())}
    assert axes == set(MESH_AXES)


def test_every_kernel_of_the_model_has_axes():
    tree = shapes(llama_config(num_hidden_layers=1, attention_bias=True, mlp_bias=True))
    mesh = make_mesh(MeshConfig(2, 2, 2))
    assert len(flatten(tree_shardings(mesh, tree))) == len(flatten(tree))


def constraints(text):
    """Shapes and shardings of the activation constraints in lowered code."""
    pattern = r"sdy\.sharding_constraint.*?<@\w+, (\[.*?\])>.*?tensor<([\dx]+)xf32>"
    return {(shape, axes) for axes, shape in re.findall(pattern, text)}


def test_activation_constraints_reach_the_compiler(run):
    lowered = run.step.lower(run.state, run.frozen, ragged_batch())
    found = constraints(lowered.as_text())
    rows = '{"data", "fsdp"}'
    assert {
        ("32x10x32", f"[{rows}, {{}}, {{}}]"),
        ("32x10x16x4", f'[{rows}, {{}}, {{"tensor"}}, {{}}]'),
        ("32x10x48", f'[{rows}, {{}}, {{"tensor"}}]'),
    } <= found


def hidden_sharding(constrained):
    """Where the compiler puts the final states of a batch that is not placed itself."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    config = llama_config(num_hidden_layers=1)
    model, params = Run(config=config).model, adapted_params(config)

    def apply(tokens):
        if not constrained:
            return model.apply({"params": params}, tokens, method="hidden_states")
        with use_mesh(mesh):
            return model.apply({"params": params}, tokens, method="hidden_states")

    replicated = jax.sharding.NamedSharding(mesh, PartitionSpec())
    step = jax.jit(apply, in_shardings=replicated)
    return step(jnp.asarray(ragged_batch()["tokens"])).sharding


def test_activation_constraints_split_the_rows():
    assert hidden_sharding(constrained=True).spec[0] == ("data", "fsdp")
    assert hidden_sharding(constrained=False).is_fully_replicated


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


def test_the_start_of_a_run_leaves_the_given_parameters_alive():
    params = adapted_params(llama_config(num_hidden_layers=1))
    Run(params=params).train(1)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_one_compilation_serves_all_batches(run):
    run.train(3)
    assert run.step._cache_size() == 1


def problems(mesh, batch_size=ROWS, grad_accum_steps=1, **changes):
    with pytest.raises(UsageError) as caught:
        check_divisible(
            make_mesh(MeshConfig(*mesh)),
            llama_config(**changes),
            batch_size,
            grad_accum_steps,
        )
    return str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), "data=3, fsdp=1, tensor=1 does not make 8 devices"),
        ((0, 3, 1), "data=0, fsdp=3, tensor=1 does not make 8 devices"),
        ((0, 0, 1), "only one of data, fsdp and tensor may be 0"),
        ((4, 4, 1), "data=4, fsdp=4, tensor=1 does not make 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, message):
    with pytest.raises(UsageError, match=message):
        make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((0, 1, 1), (8, 1, 1)),
        ((0, 2, 2), (2, 2, 2)),
        ((2, 0, 1), (2, 4, 1)),
        ((1, 1, 0), (1, 1, 8)),
    ],
)
def test_a_mesh_axis_of_zero_takes_the_rest(sizes, expected):
    assert tuple(make_mesh(MeshConfig(*sizes)).shape.values()) == expected


def test_a_mesh_that_cuts_a_head_lists_the_legal_sizes():
    message = problems((1, 1, 8), num_key_value_heads=4)
    assert "mesh.tensor=8 does not divide num_key_value_heads=4 " in message
    assert "(legal: 1, 2, 4)" in message


def test_all_faults_of_a_mesh_are_listed_at_once():
    message = problems((1, 8, 1), batch_size=12, hidden_size=20)
    assert "mesh.data*mesh.fsdp=8 does not divide the 12 rows" in message
    assert "mesh.fsdp=8 does not divide hidden_size=20 (legal: 1, 2, 4" in message


def test_rows_are_counted_per_accumulated_part():
    message = problems((8, 1, 1), batch_size=32, grad_accum_steps=8)
    assert "does not divide the 4 rows" in message
    assert "train.batch_size=32 / train.grad_accum_steps=8" in message


@pytest.mark.parametrize("mesh", MESHES)
def test_legal_meshes_pass(mesh):
    check_divisible(make_mesh(MeshConfig(*mesh)), llama_config(), ROWS, 4)


# Layers, hidden, intermediate, heads, kv heads, vocabulary, tied; parameters by the models'
# own reports.
REAL_SIZES = {
    "1B": (16, 2048, 8192, 32, 8, 128256, True, 1_235_814_400),
    "3B": (28, 3072, 8192, 24, 8, 128256, True, 3_212_749_824),
    "7B": (32, 4096, 11008, 32, 32, 32000, False, 6_738_415_616),
    "8B": (32, 4096, 14336, 32, 8, 128256, False, 8_030_261_248),
    "13B": (40, 5120, 13824, 40, 40, 32000, False, 13_015_864_320),
    "70B": (80, 8192, 28672, 64, 8, 128256, False, 70_553_706_496),
}


@pytest.mark.parametrize("name", REAL_SIZES)
def test_real_sizes_build_count_and_shard_without_memory(name):
    layers, hidden, intermediate, heads, kv_heads, vocab, tied, total = REAL_SIZES[name]
    config = llama_config(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        head_dim=hidden // heads,
        tie_word_embeddings=tied,
    )
    mesh = make_mesh(MeshConfig(1, 2, 4))
    check_divisible(mesh, config, 8)
    base = shapes(config, jnp.bfloat16)
    assert count_parameters(base) == (0, total)
    params = jax.eval_shape(lambda p: add_lora(p, ALL_LINEAR, jax.random.key(0)), base)
    shardings = tree_shardings(mesh, params)
    on_a_device = sum(
        np.prod(sharding.shard_shape(leaf.shape), dtype=np.int64) * leaf.dtype.itemsize
        for sharding, leaf in zip(
            jax.tree.leaves(shardings), jax.tree.leaves(params), strict=True
        )
    )
    # Norms and ranks are on every device, the rest is split by 8.
    assert on_a_device == pytest.approx(2 * total / 8, rel=0.01)


def test_the_config_has_sizes_of_their_own():
    assert ROWS * 10 not in CONFIG.values()
