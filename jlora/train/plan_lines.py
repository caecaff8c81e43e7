"""The lines of `--plan`: memory and speed of a run, and what else would fit."""

import math
from collections.abc import Callable
from dataclasses import replace

from jax.sharding import Mesh

from jlora.lora.adapter_tree import Params
from jlora.ops.quantize import stored_format
from jlora.parallel.described_devices import DescribedDevice, kind_of
from jlora.train.memory_estimate import (
    Workload,
    device_memory_bytes,
    host_bytes,
    host_memory_bytes,
)
from jlora.train.pauses import duration
from jlora.train.planning import Planner, mesh_in_words, planned_bytes, usable_bytes

# Lengths that are looked at are multiples of it: what the fused kernels take.
_LENGTH_STEP = 256
_LESS_MEMORY = {
    "none": "minimal, full or offload",
    "minimal": "full or offload",
    "full": "offload",
}


def plan_lines(
    planner: Planner, work: Workload, mesh: Mesh, total_steps: int
) -> list[str]:
    """Returns what the plan says of a device's memory, of speed and of other sizes."""
    lines = memory_table(planner.params, work, mesh)
    lines += _advice(planner, work, mesh)
    lines += _speed(planner, work, mesh, total_steps)
    return [*lines, *_largest_sizes(planner, work, mesh), *_better_mesh(planner, mesh)]


def _advice(planner: Planner, work: Workload, mesh: Mesh) -> list[str]:
    """Returns what would take less memory, if the run does not fit."""
    needed = sum(planned_bytes(planner.params, work).values())
    if needed <= usable_bytes(mesh):
        return []
    savers = []
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    unit = _length_step(mesh)
    least = _any_size(planner).on(mesh, rows=shards, length=min(planner.length, unit))
    if sum(planned_bytes(planner.params, least).values()) <= usable_bytes(mesh):
        if planner.batch_size // planner.parts > shards:
            savers.append("fewer rows at a time (train.grad_accum_steps)")
        if planner.length > unit:
            savers.append("a shorter data.seq_len")
    if work.compute.platform != "cpu":
        if more := _LESS_MEMORY.get(work.compute.remat):
            savers.append(f"compute.remat {more}")
        stored, asked = stored_format(planner.params), planner.compute.base_dtype
        if stored is None or (stored != "nf4" and asked != "keep"):
            savers.append("compute.base_dtype nf4")
        savers.append("mesh.fsdp over more devices")
    savers = savers or ["a machine with more memory, or a smaller model"]
    return [f"  to make it fit: {', or '.join(savers)}"]


def _speed(planner: Planner, work: Workload, mesh: Mesh, total_steps: int) -> list[str]:
    expected, kind = planner.time(work, mesh), kind_of(mesh.devices.flat[0])
    if expected is None or kind is None:
        return []
    rate = planner.batch_size * planner.length / expected.total
    parts = {
        "products": expected.products,
        "attention": expected.attention,
        "other passes": expected.passes,
        "waiting for collectives": expected.exposed,
    }
    named = ", ".join(f"{name} {1e3 * s:,.0f}" for name, s in parts.items() if s)
    is_hopper = kind.device_kind in ("H100", "H200")
    data_of_two = kind.device_kind == "H200" and mesh.shape["data"] == mesh.size == 2
    measured = (is_hopper and mesh.size == 1) or data_of_two
    lines = [
        f"expected: {rate:,.0f} tokens/s, {1e3 * expected.total:,.0f} ms a step "
        f"({named}), {duration(total_steps * expected.total)} for {total_steps:,} "
        "steps" + ("" if measured else "; not measured on such a mesh: an expectation")
    ]
    if mesh.size > 1:
        received = expected.wire_bytes / 2**30
        lines.append(f"each device receives {received:.2f} GiB in a step")
    return lines


def _largest_sizes(planner: Planner, work: Workload, mesh: Mesh) -> list[str]:
    """Returns the largest batch at this length, and the largest length at this batch."""
    if not planned_bytes(planner.params, work):
        return []

    planner, unit = _any_size(planner), _length_step(mesh)
    # With auto the largest that fits takes the least memory, so only that is looked at.
    is_auto = planner.compute.remat == "auto" and work.compute.platform != "cpu"
    least = replace(planner.compute, remat="offload") if is_auto else planner.compute

    def fits(**changes: int) -> bool:
        tried = planner.on(mesh, compute=least, **changes)
        return sum(planned_bytes(planner.params, tried).values()) <= usable_bytes(mesh)

    def with_remat(**changes: int) -> str:
        found = planner.on(mesh, **changes).compute
        return "" if found.platform == "cpu" else f" (remat {found.remat})"

    step = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = step * _largest(lambda n: fits(rows=n * step), 2**16)
    most = planner.config.longest // unit
    length = unit * _largest(lambda n: fits(length=n * unit), most)
    sizes = []
    if rows:
        batch = f"train.batch_size {rows * planner.parts:,} at this length"
        sizes.append(batch + with_remat(rows=rows))
    if length:
        limit = ", the model's longest" if length == most * unit else ""
        size = f"data.seq_len {length:,} at this batch{limit}"
        sizes.append(size + with_remat(length=length))
    return [f"largest that fits: {'; '.join(sizes)}"] if sizes else []


def _length_step(mesh: Mesh) -> int:
    """Returns what lengths that are looked at are multiples of, so that the mesh divides them."""
    return math.lcm(_LENGTH_STEP, mesh.shape["context"])


def _any_size(planner: Planner) -> Planner:
    """Returns a planner that refuses no size because of the fused kernels."""
    if planner.compute.kernels != "hopper":
        return planner
    return replace(planner, compute=replace(planner.compute, kernels="auto"))


def _better_mesh(planner: Planner, mesh: Mesh) -> list[str]:
    """Returns the mesh that `--mesh auto` would take, if that is another."""
    if mesh.size == 1:
        return []
    best = planner.best_mesh(list(mesh.devices.flat))
    if best.shape == mesh.shape:
        return ["--mesh auto chooses this mesh"]
    work = planner.on(best)
    expected = planner.time(work, best)
    rate = ""
    if expected:
        tokens = planner.batch_size * planner.length / expected.total
        rate = f": {tokens:,.0f} tokens/s expected"
    return [f"--mesh auto chooses {mesh_in_words(best)}{rate}"]


def memory_table(params: Params, work: Workload, mesh: Mesh) -> list[str]:
    """Returns one line per part, in GiB, and the sum against the device's memory."""
    parts = planned_bytes(params, work)
    if not parts:
        return [
            "memory: not estimated on a CPU for quantised bases, DoRA, adapters of "
            "embedding or head, sweeps, or several devices of a process"
        ]
    on_cpu = work.compute.platform == "cpu"
    total, limit = sum(parts.values()), device_memory_bytes(mesh)
    fits = "fits" if total <= usable_bytes(mesh) else "does not fit"
    lines = [
        f"memory of {'the process' if on_cpu else 'each device'}:",
        *(f"  {name:<24} {size / 2**30:8.2f} GiB" for name, size in parts.items()),
        f"  {'sum (estimate)':<24} {total / 2**30:8.2f} GiB of {limit / 2**30:.2f} GiB: "
        f"{fits}",
    ]
    if kept := work.devices * host_bytes(work):
        host = f" of {host_memory_bytes() / 2**30:.2f} GiB"
        is_here = not isinstance(mesh.devices.flat[0], DescribedDevice)
        lines.append(
            f"layer inputs, on the host: {kept / 2**30:.2f} GiB"
            + (host if is_here else "")
        )
    return lines


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """Returns the largest number up to `most` that fits, 0 if not even 1 does."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
