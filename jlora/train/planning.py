"""What a run takes on its devices, and on others: for `--plan`, and for the mesh it chooses."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import Mesh

from jlora.config.llama_config import LlamaConfig
from jlora.config.run_config import ComputeConfig, MeshConfig
from jlora.errors import UsageError
from jlora.lora.adapter_tree import Params, count_parameters
from jlora.parallel.described_devices import described_devices
from jlora.parallel.processes import check_agreement
from jlora.parallel.sharding import check_divisible, make_mesh
from jlora.train.cpu_memory import cpu_memory_bytes
from jlora.train.memory_estimate import (
    USABLE_SHARE,
    Workload,
    device_memory_bytes,
    memory_bytes,
    plan_workload,
)
from jlora.train.step_time_model import StepTime, step_time


@dataclass(frozen=True)
class Planner:
    """A run whose mesh, rows or length may still change.

    Attributes:
        config: the architecture.
        params: shapes of the base with the adapter that has the most to train.
        compute: what the user asked for.
        batch_size: rows of an optimizer step.
        parts: that a batch is computed in.
        length: tokens per row.
        max_segments: most documents in a row.
        adapters: trained at once.
        optimizer: its rule.
    """

    config: LlamaConfig
    params: Params
    compute: ComputeConfig
    batch_size: int
    parts: int
    length: int
    max_segments: int = 0
    adapters: int = 1
    optimizer: str = "adamw"

    @classmethod
    def of(
        cls,
        config: LlamaConfig,
        trees: Mapping[str, Params],
        compute: ComputeConfig,
        args: Any,
        length: int,
    ) -> "Planner":
        """Returns the planner of adapters that are trained at once, by name; args: of train.py."""
        return cls(
            config,
            max(trees.values(), key=lambda tree: count_parameters(tree)[0]),
            compute,
            args.train.batch_size,
            args.train.grad_accum_steps,
            length,
            adapters=len(trees),
            optimizer=args.optim.optimizer,
        )

    def on(self, mesh: Mesh, **changes: Any) -> Workload:
        """Returns what a device of the mesh computes; see `plan_workload`."""
        wanted = {
            "compute": self.compute,
            "rows": self.batch_size // self.parts,
            "length": self.length,
        }
        return plan_workload(
            self.config,
            self.params,
            mesh,
            max_segments=self.max_segments,
            adapters=self.adapters,
            optimizer=self.optimizer,
            **(wanted | changes),
        )

    def mesh(self, config: MeshConfig, device: str | None) -> Mesh:
        """Returns the mesh of a run: that of the flags, or the one expected to be fastest.

        Raises:
            UsageError: as `make_mesh` and `check_divisible`, or an unknown device.
        """
        devices = described_devices(device) if device else None
        mesh = make_mesh(replace(config, auto=False), devices)
        if config.auto:
            best = self.best_mesh(list(mesh.devices.flat))
            check_agreement({"mesh.auto": dict(best.shape)})
            return best
        self._check(mesh)
        return mesh

    def best_mesh(self, devices: list[Any]) -> Mesh:
        """Returns the mesh over these devices on which a step is expected to be fastest.

        Of meshes on which it does not fit, that with the least memory. Where no time can be
        expected, that which splits least.

        Raises:
            UsageError: no mesh divides the batch and the model.
        """
        found, reason = [], None
        for sizes in _sizes(len(devices), self.batch_size // self.parts):
            mesh = make_mesh(sizes, devices)
            try:
                self._check(mesh)
                work = self.on(mesh)
            except UsageError as error:
                reason = reason or error
                continue
            needed = sum(planned_bytes(self.params, work).values())
            over = max(0, needed - usable_bytes(mesh))
            expected = self.time(work, mesh)
            seconds = expected.total if expected else 0
            found.append(((-over, -seconds, *mesh.shape.values()), mesh))
        if not found:
            raise UsageError(f"mesh.auto: no mesh of {len(devices)} devices: {reason}")
        return max(found, key=lambda pair: pair[0])[1]

    def time(self, work: Workload, mesh: Mesh) -> StepTime | None:
        """Returns the expected time of an optimizer step, or None; see `step_time`."""
        return step_time(self.params, work, mesh, parts=self.parts)

    def _check(self, mesh: Mesh) -> None:
        check_divisible(mesh, self.config, self.batch_size, self.parts)


def planned_bytes(params: Params, work: Workload) -> dict[str, int]:
    """Returns the estimated bytes of each part of a device's memory, {} without an estimate.

    On a CPU it is the memory of the process.
    """
    on_cpu = work.compute.platform == "cpu"
    return (cpu_memory_bytes if on_cpu else memory_bytes)(params, work)


def usable_bytes(mesh: Mesh) -> float:
    """Returns the memory of each device that a step may take."""
    return USABLE_SHARE * device_memory_bytes(mesh)


def mesh_in_words(mesh: Mesh) -> str:
    """Returns the sizes of the axes that have more than one device."""
    sizes = [f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1]
    return ", ".join(sizes) or "one device"


def _sizes(count: int, rows: int) -> Iterator[MeshConfig]:
    """Yields the meshes of so many devices; rows are split if they are too few to go round."""
    for tensor in _divisors(count):
        for context in _divisors(count // tensor) if rows < count else [1]:
            rest = count // tensor // context
            for fsdp in _divisors(rest):
                yield MeshConfig(rest // fsdp, fsdp, tensor, context)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
