import re
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training_cases import (
    ALL_LINEAR,
    MESHES,
    ROWS,
    Run,
    adapted_params,
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
    check_length,
    make_mesh,
    tree_shardings,
    use_mesh,
)


def test_every_logical_axis_in_use_has_a_rule():
    files = Path(jlora.__file__).parent.rglob("*.py")
    code = "\n".join(file.read_text("utf-8") for file in files)
    groups = re.findall(r"with_logical_constraint\([^()]*\(([^()]*)\)", code)
    assert len(groups) == code.count("nn.with_logical_constraint(")
    named = {name for group in groups for name in re.findall(r"\"(\w+)\"", group)}
    assert {"batch", "length", "act_embed", "act_heads", "act_mlp", "vocab"} <= named
    in_kernels = {name for axes in KERNEL_AXES.values() for name in axes if name}
    assert (named | in_kernels) - {name for name, _ in RULES} == set()


def test_rules_name_mesh_axes_only():
    axes = {axis for _, rule in RULES for axis in np.atleast_1d(rule or ())}
    assert axes == set(MESH_AXES)


def test_every_kernel_of_the_model_has_axes():
    tree = shapes(llama_config(num_hidden_layers=1, attention_bias=True, mlp_bias=True))
    mesh = make_mesh(MeshConfig(2, 2, 2))
    assert len(flatten(tree_shardings(mesh, tree))) == len(flatten(tree))


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
        ((3, 3, 1), "data=3, fsdp=3, tensor=1, context=1 does not make 8 devices"),
        ((0, 3, 1), "data=0, fsdp=3, tensor=1, context=1 does not make 8 devices"),
        ((0, 0, 1), "only one of data, fsdp, tensor, context may be 0"),
        ((4, 1, 1, 4), "data=4, fsdp=1, tensor=1, context=4 does not make 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, message):
    with pytest.raises(UsageError, match=message):
        make_mesh(MeshConfig(*sizes))


def test_a_smaller_mesh_takes_the_first_devices():
    assert make_mesh(MeshConfig(1)).devices.flat[0] == jax.devices()[0]
    assert list(make_mesh(MeshConfig(1, 3, 2)).devices.flat) == jax.devices()[:6]


def test_several_processes_use_all_their_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UsageError, match="the product of them must, and"):
        make_mesh(MeshConfig(4))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((0, 1, 1), {"data": 8, "fsdp": 1, "context": 1, "tensor": 1}),
        ((0, 2, 2), {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}),
        ((2, 0, 1), {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}),
        ((1, 1, 0), {"data": 1, "fsdp": 1, "context": 1, "tensor": 8}),
        ((2, 1, 1, 0), {"data": 2, "fsdp": 1, "context": 4, "tensor": 1}),
    ],
)
def test_a_mesh_axis_of_zero_takes_the_rest(sizes, expected):
    assert dict(make_mesh(MeshConfig(*sizes)).shape) == expected


def test_a_mesh_that_cuts_a_head_lists_the_legal_sizes():
    message = problems((1, 1, 8), num_key_value_heads=4)
    assert "mesh.tensor=8 does not divide num_key_value_heads=4 " in message
    assert "(legal: 1, 2, 4)" in message


def test_a_mesh_with_too_few_heads_to_exchange_for_tokens_lists_the_legal_sizes():
    message = problems((1, 1, 2, 4), num_attention_heads=4, num_key_value_heads=2)
    assert (
        "mesh.context*mesh.tensor=8 does not divide num_attention_heads=4 " in message
    )
    assert "(legal: 1, 2, 4)" in message


def test_rows_that_do_not_divide_into_equal_parts_are_refused():
    mesh = make_mesh(MeshConfig(1, 1, 1, 3))
    check_length(mesh, 66)
    with pytest.raises(
        UsageError, match=r"mesh.context=3 does not divide .* 64 tokens"
    ):
        check_length(mesh, 64)


def test_all_faults_of_a_mesh_are_listed_at_once():
    message = problems((1, 8, 1), batch_size=12, hidden_size=20, intermediate_size=44)
    assert "mesh.data*mesh.fsdp=8 does not divide the 12 rows" in message
    assert "mesh.fsdp=8 does not divide hidden_size=20 (legal: 1, 2, 4" in message
    assert "mesh.fsdp*mesh.tensor=8 does not divide intermediate_size=44" in message


def test_rows_are_counted_per_accumulated_part():
    message = problems((8, 1, 1), batch_size=32, grad_accum_steps=8)
    assert "does not divide the 4 rows" in message
    assert "train.batch_size=32 / train.grad_accum_steps=8" in message
    assert message.endswith("give train.batch_size a multiple of 64")


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


def test_arrays_of_one_element_beside_vectors_are_on_every_device():
    """Adafactor keeps them in place of a vector's rows and columns."""
    mesh = make_mesh(MeshConfig(1, 1, 2), jax.devices()[:2])
    shapes = {"lora_magnitude": jnp.zeros(8), "lora_A": jnp.zeros((8, 1))}
    tree = {"q_proj": shapes, "v": {"q_proj": {"lora_magnitude": jnp.zeros(1)}}}
    found = tree_shardings(mesh, tree)
    assert found["q_proj"]["lora_magnitude"].spec == PartitionSpec("tensor")
    assert found["v"]["q_proj"]["lora_magnitude"].spec == PartitionSpec()


@dataclass(frozen=True)
class Chip:
    """A chip of a TPU slice, with what JAX places a mesh by."""

    coords: tuple[int, int, int]
    device_kind: str
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0
    slice_index: int = 0

    @property
    def id(self) -> int:
        return hash(self.coords)


@pytest.mark.parametrize(
    ("kind", "torus"), [("TPU v6 lite", (4, 4, 1)), ("TPU v5", (2, 2, 4))]
)
def test_a_mesh_may_cut_the_axes_of_a_slice(kind, torus):
    chips = [Chip(place, kind) for place in np.ndindex(torus)]
    for sizes in (MeshConfig(2, 8), MeshConfig(1, 16), MeshConfig(2, 2, 2, 2)):
        mesh = make_mesh(sizes, list(chips))
        assert set(mesh.devices.flat) == set(chips)
