"""Predicted speed and memory beside figures that were measured on GPUs.

Sources: docs/performance.md, benchmarks/LOG.md and benchmarks/results/step_time.jsonl.
"""

import importlib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jlora.lora.initialisation import add_lora
from jlora.parallel.described_devices import described_devices
from jlora.parallel.sharding import MESH_AXES
from jlora.train.memory_estimate import memory_bytes, plan_workload
from jlora.train.step_time_model import StepTime, step_time

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Device, workload, base, remat: tokens per second, peak GiB.
MEASURED: dict[tuple[str, str, str, str], tuple[float, float]] = {
    ("h200", "A", "keep", "minimal"): (21297, 35.88),
    ("h200", "B", "keep", "minimal"): (17118, 39.26),
    ("h200", "B", "keep", "full"): (12961, 18.80),
    ("h200", "B", "keep", "offload"): (12811, 17.23),
    ("h200", "B-16k", "keep", "minimal"): (12522, 62.70),
    ("h200", "A", "fp8", "minimal"): (32370, 29.83),
    ("h200", "B", "fp8", "minimal"): (24272, 32.77),
    ("h200", "B", "int8", "minimal"): (25284, 32.77),
    ("h200", "B", "nf4", "minimal"): (16512, 29.92),
    ("h200", "B", "nf4", "full"): (12181, 9.27),
    ("h200", "C", "nf4", "offload"): (1369, 45.10),
    ("h100", "A", "keep", "minimal"): (20807, 35.88),
    ("h100", "B", "keep", "minimal"): (16643, 39.29),
    ("h100", "B", "keep", "full"): (12606, 18.78),
    ("h100", "B-16k", "keep", "minimal"): (12621, 63.25),
}


@pytest.fixture(scope="module")
def workloads() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module("step_time").WORKLOADS


@pytest.fixture(scope="module")
def shapes(workloads: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        base_of = importlib.import_module("memory_table").base_of

    @cache
    def made(name: str, dtype: str) -> Any:
        work = workloads[name]
        base = base_of(work.config, "bfloat16" if dtype == "keep" else dtype)
        return jax.eval_shape(
            lambda base: add_lora(base, work.lora, jax.random.key(0)), base
        )

    return made


def planned(
    work: Any, params: Any, device: str, sizes: Any = (1, 1, 1), **compute: Any
) -> tuple[Any, Mesh]:
    count = int(np.prod(sizes))
    devices = np.empty(count, object)
    devices[:] = described_devices(f"{device}:{count}")
    data, fsdp, tensor, context = (*sizes, 1)[:4]
    mesh = Mesh(devices.reshape(data, fsdp, context, tensor), MESH_AXES)
    planned = plan_workload(
        work.config,
        params,
        mesh,
        compute=replace(work.compute, **compute),
        rows=work.rows * count,
        length=work.length,
    )
    return planned, mesh


def predicted(params: Any, work: Any, mesh: Mesh, parts: int = 1) -> StepTime:
    found = step_time(params, work, mesh, parts=parts)
    assert found is not None
    return found


def rate(params: Any, work: Any, mesh: Mesh) -> float:
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    tokens = shards * work.rows * work.length
    return tokens / predicted(params, work, mesh).total


@pytest.mark.parametrize("case", MEASURED, ids=" ".join)
def test_a_step_is_as_fast_and_as_large_as_predicted(workloads, shapes, case):
    device, name, base, remat = case
    params = shapes(name, base)
    work, mesh = planned(workloads[name], params, device, base_dtype=base, remat=remat)
    speed, gib = MEASURED[case]
    assert rate(params, work, mesh) == pytest.approx(speed, rel=0.1)
    found = sum(memory_bytes(params, work).values()) / 2**30
    assert found == pytest.approx(gib, rel=0.1)


@pytest.mark.parametrize(("kernels", "speed"), [("hopper", 33665), ("xla", 31479)])
def test_two_gpus_that_split_the_rows(workloads, shapes, kernels, speed):
    params = shapes("B", "keep")
    work, mesh = planned(workloads["B"], params, "h200", (2, 1, 1), kernels=kernels)
    assert rate(params, work, mesh) == pytest.approx(speed, rel=0.1)


def test_a_device_of_a_context_axis_receives_what_it_exchanges(workloads, shapes):
    params = shapes("B", "keep")
    work, mesh = planned(workloads["B"], params, "h200", (1, 1, 1, 2))
    # Of 32 layers and 8,192 tokens; queries and outputs, keys and values, twice, and outputs
    # once more, in bfloat16.
    heads, adapter = 2 * 2 * (32 + 8) + 32, 4 * 41_943_040
    exchanged = 32 * 8192 * heads * 128 * 2 / 2
    found = predicted(params, work, mesh)
    assert found.wire_bytes == pytest.approx(exchanged + adapter)
    alone, one = planned(workloads["B"], params, "h200")
    # As many tokens, with the same attention.
    assert found.computing == pytest.approx(predicted(params, alone, one).computing)


def test_gathering_costs_what_attention_does_not_hide(workloads, shapes):
    """On NVLink a layer arrives beside attention, over PCIe it does not."""
    params = shapes("B", "keep")
    shares = {}
    for device, sizes in [
        ("h200", (1, 2, 1)),
        ("l40s", (1, 2, 1)),
        ("h200", (1, 1, 2)),
    ]:
        work, mesh = planned(workloads["B"], params, device, sizes, remat="full")
        found = predicted(params, work, mesh)
        shares[device, sizes] = found.exposed / found.total
    assert shares["h200", (1, 2, 1)] < 0.02
    assert shares["l40s", (1, 2, 1)] > 0.05
    assert 0.05 < shares["h200", (1, 1, 2)] < 0.2


def test_a_device_receives_the_other_half_of_what_it_gathers(workloads, shapes):
    params = shapes("B", "nf4")
    work, mesh = planned(workloads["B"], params, "h200", (1, 2, 1), base_dtype="nf4")
    layer, ends, adapter = 6_979_321_856 * 0.5625, 2 * 2 * 525_336_576, 4 * 41_943_040
    expected = (2 * layer + ends) / 2 + adapter / 2 + adapter
    assert predicted(params, work, mesh).wire_bytes == pytest.approx(expected, rel=0.01)


def test_parts_of_a_batch_gather_the_layers_again_but_not_the_ends(workloads, shapes):
    params = shapes("B", "keep")
    work, mesh = planned(workloads["B"], params, "h200", (1, 2, 1))
    one, two = (predicted(params, work, mesh, n) for n in (1, 2))
    assert two.computing == pytest.approx(2 * one.computing)
    assert 1.7 * one.wire_bytes < two.wire_bytes < 1.95 * one.wire_bytes


@pytest.mark.parametrize("changes", [{"dtype": "float32"}, {"device": "cpu"}])
def test_nothing_is_predicted_where_nothing_was_measured(workloads, shapes, changes):
    params = shapes("B", "keep")
    if "device" in changes:
        work, _ = planned(workloads["B"], params, "h200")
        mesh = jax.make_mesh(
            (1,) * len(MESH_AXES), MESH_AXES, devices=jax.devices()[:1]
        )
    else:
        work, mesh = planned(workloads["B"], params, "h200", **changes)
    assert step_time(params, work, mesh) is None
