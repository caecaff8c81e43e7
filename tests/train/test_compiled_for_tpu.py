"""A train step compiled for a slice of TPUs that is not here: what its program holds."""

import math
import os
import re
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers.training_cases import ADAM, ALL_LINEAR, llama_config, shapes
from jax.experimental import topologies

from jlora.config.run_config import ComputeConfig, MeshConfig
from jlora.lora.adapter_tree import split, trainable_mask
from jlora.lora.initialisation import add_lora
from jlora.model.llama import Llama
from jlora.model.remat.layer_runs import equal_runs, stacked
from jlora.parallel.sharding import batch_sharding, make_mesh, tree_shardings
from jlora.train.memory_estimate import memory_bytes, plan_workload
from jlora.train.optimizer import make_optimizer, make_schedule
from jlora.train.step import TrainState, make_train_step

# `make test` names a folder outside of the environment: with libtpu in it, each start of JAX
# would look for TPUs first.
if not (os.environ.get("TPU_LIBRARY_PATH") or find_spec("libtpu")):
    pytest.skip(
        "needs the TPU compiler: pip install libtpu (Linux on x86-64)",
        allow_module_level=True,
    )

# No weight has the shape of an activation, and none of a layer that of an end.
CONFIG = llama_config(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=640,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)
CHIPS, LENGTH = 4, 128
LAYER_SHAPES = {(256, 256), (256, 128), (256, 640), (640, 256)}


def base_shapes(stored: str) -> dict[str, Any]:
    """The shapes of the base in bfloat16, or with layers in int8."""

    def visit(tree: dict[str, Any], module: str = "") -> dict[str, Any]:
        if stored == "int8" and module.endswith("_proj"):
            size = tree["kernel"].shape
            return {
                "kernel_q": jax.ShapeDtypeStruct(size, jnp.int8),
                "kernel_scale": jax.ShapeDtypeStruct(size[1:], jnp.float32),
            }
        return {
            name: visit(part, name) if isinstance(part, dict) else part
            for name, part in tree.items()
        }

    return visit(shapes(CONFIG, jnp.bfloat16))


def placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        tree,
        shardings,
    )


class Program:
    """The compiled step, and what went into it."""

    def __init__(self, stored: str) -> None:
        self.stored = stored
        slice_ = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
        mesh = make_mesh(MeshConfig(1, CHIPS, 1), list(slice_.devices))
        lora = replace(ALL_LINEAR, r=16)
        self.params: Any = jax.eval_shape(
            lambda base: add_lora(base, lora, jax.random.key(1)), base_shapes(stored)
        )
        work = plan_workload(
            CONFIG,
            self.params,
            mesh,
            compute=ComputeConfig(remat="minimal"),
            rows=CHIPS,
            length=LENGTH,
        )
        self.planned = sum(memory_bytes(self.params, work).values())
        optimizer = make_optimizer(ADAM, make_schedule(ADAM, 10))
        self.trainable, frozen = split(self.params, trainable_mask(self.params))
        number = jax.ShapeDtypeStruct((), jnp.int32)
        moments: Any = jax.eval_shape(optimizer.init, self.params)
        state = TrainState(number, self.trainable, moments, number, number)
        runs = equal_runs(self.params["layers"])
        frozen = jax.eval_shape(lambda tree: stacked(tree, runs), frozen)
        state, frozen = (placed(x, tree_shardings(mesh, x)) for x in (state, frozen))
        row = (CHIPS, LENGTH)
        names = ("tokens", "targets", "segment_ids", "positions")
        batch = {name: jax.ShapeDtypeStruct(row, jnp.int32) for name in names}
        batch["loss_mask"] = jax.ShapeDtypeStruct(row, jnp.float32)
        step = make_train_step(
            Llama.with_compute(CONFIG, work.compute),
            optimizer,
            mesh,
            state=state,
            frozen=frozen,
        )
        batch = placed(batch, jax.tree.map(lambda _: batch_sharding(mesh), batch))
        compiled = step.lower(state, frozen, batch).compile()
        self.text = compiled.as_text()
        self.memory = compiled.memory_analysis()

    def arrays(self, kind: str) -> list[tuple[str, tuple[int, ...], str]]:
        """(dtype, shape, where it comes from) of every result of collectives of a kind.

        A collective that runs beside products is written several times, with one channel.
        """
        pattern = rf"= (.+?) {kind}(?:-start)?\(.*?channel_id=(\d+).*?op_name=\"(.*?)\""
        found = {m[2]: m for m in re.finditer(pattern, self.text)}
        return [
            (dtype, tuple(int(n) for n in sizes.split(",") if n), match[3])
            for match in found.values()
            for dtype, sizes in re.findall(r"\b([a-z]+\d+)\[([\d,]*)\]", match[1])
        ]


@pytest.fixture(scope="module", params=["bfloat16", "int8"])
def program(request, tmp_path_factory):
    jax.devices()  # reads the flags of XLA, of which the TPU compiler does not know all
    least = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, least)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS", raising=False)
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")  # asks a host of Google's
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        patch.setenv("TPU_LOG_DIR", str(tmp_path_factory.mktemp("libtpu")))
        jax.config.update(least, 1e9)  # without a device none can be loaded again
        yield Program(request.param)
        jax.config.update(least, before)


def test_the_three_kernels_of_splash_are_there_once_for_all_layers(program):
    pattern = r'%(\w+?)(?:\.\d+)? = .*custom_call_target="tpu_custom_call"'
    found = sorted(re.findall(pattern, program.text))
    assert found == [
        "splash_mha_dkv_segmented_no_residuals",
        "splash_mha_dq_segmented_no_residuals",
        "splash_mha_fwd_segmented_residuals",
    ]


def test_int8_weights_are_multiplied_as_they_are(program):
    sums = re.findall(r"= s32\[[\d,]+\]\S* convolution\(", program.text)
    # Of each projection, forward and for the gradient of its input.
    assert len(sums) == (14 if program.stored == "int8" else 0)
    wide = re.findall(r"\b(?:bf16|f32)\[([\d,]+)\]", program.text)
    dequantised = {tuple(int(n) for n in text.split(",")) for text in wide}
    found = {tuple(n for n in shape if n > 1) for shape in dequantised} & LAYER_SHAPES
    assert bool(found) == (program.stored == "bfloat16")


def test_a_layer_is_gathered_in_each_pass_and_the_rest_once(program):
    gathers = program.arrays("all-gather")
    dtype = "s8" if program.stored == "int8" else "bf16"
    inside = [g for g in gathers if "layers/while" in g[2] and g[0] == dtype]
    frozen = split(program.params, trainable_mask(program.params))[1]
    kernels = [x for x in jax.tree.leaves(frozen["layers"]["0"]) if x.ndim == 2]
    assert sorted(math.prod(g[1]) for g in inside) == sorted(
        2 * [x.size for x in kernels]
    )


def test_no_loop_but_that_over_layers_has_a_collective(program):
    kinds = "all-gather", "all-reduce", "reduce-scatter", "all-to-all"
    found = [g for kind in kinds for g in program.arrays(kind)]
    assert found
    looped = [g for g in found if "while/body" in g[2]]
    assert all("layers/while" in g[2] and "all_gather" in g[2] for g in looped)


def test_only_gradients_of_the_adapter_are_summed(program):
    sums = [g for g in program.arrays("all-reduce") if "all_gather" not in g[2]]
    arrays = [shape for dtype, shape, _ in sums if shape]
    assert {dtype for dtype, shape, _ in sums if shape} == {"f32"}
    trainable = sum(x.size for x in jax.tree.leaves(program.trainable))
    assert sum(map(math.prod, arrays)) == trainable


def test_a_chip_needs_no_more_memory_than_planned(program):
    found = program.memory.argument_size_in_bytes + program.memory.temp_size_in_bytes
    assert found <= program.planned
