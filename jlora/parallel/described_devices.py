"""Devices by name: what is known of each kind, and meshes of devices that are not there.

`KINDS` is the one table. Rates are the vendors' for dense products, as are bandwidths; what
a program reaches of them is in `jlora.train.step_time_model`.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from jlora.cli.process_setup import GPU_MEMORY_SHARE
from jlora.errors import UsageError, listing, nearest


@dataclass(frozen=True)
class DeviceKind:
    """What a plan needs to know of a device; bytes and operations per second."""

    platform: str
    device_kind: str
    """A part of the name that JAX gives it."""
    memory_gib: float
    """As its driver reports it; a GPU's first megabytes are not offered."""
    bandwidth: float
    """Of its memory."""
    products: dict[str, float]
    """Dense peak by format of the operands; a format that is missing is not multiplied."""
    link: float
    """To other devices beside it, in each direction."""
    linked: int
    """Devices that such links join: of a GPU's host, or of the largest slice."""
    capability: str = ""
    """Compute capability of an NVIDIA GPU."""


def _gpu(
    name: str,
    capability: str,
    memory: float,
    bandwidth: float,
    products: tuple[float, float, float],
    link: float,
) -> DeviceKind:
    named = zip(("bf16", "fp8", "int8"), products, strict=True)
    rates = {key: rate * 1e12 for key, rate in named if rate}
    return DeviceKind(
        "gpu", name, memory, bandwidth * 1e9, rates, link * 1e9, 8, capability
    )


def _tpu(
    name: str,
    memory: float,
    bandwidth: float,
    products: tuple[float, float],
    link: float,
    linked: int,
) -> DeviceKind:
    rates = {"bf16": products[0] * 1e12, "int8": products[1] * 1e12}
    return DeviceKind("tpu", name, memory, bandwidth * 1e9, rates, link * 1e9, linked)


# Of GPUs: compute capability, GiB, GB/s, dense TFLOP/s of bf16 and fp8 and TOP/s of int8 (0:
# the tensor cores do not take it), GB/s to the others of its host in each direction.
# Sources: NVIDIA's datasheets of H100 SXM, H200 SXM, A100 SXM, L4, L40S and DGX B200 (whose
# rates with sparsity are halved), and appendix A of its whitepapers on GA102 and Ada for the
# two GeForce cards, whose products here add in float32. NVLink's total is halved for one
# direction; cards without it have 16 lanes of PCIe 4. Memory is nvidia-smi's.
#
# Of TPUs: GiB, GB/s, TFLOP/s of bf16 and TOP/s of int8, GB/s along one axis of the torus
# (two links), chips of the largest slice. Sources: Google Cloud's pages of the versions, and
# "How to Scale Your Model" (Austin et al., 2025), chapter on TPUs, for the links.
KINDS = {
    "b200": _gpu("B200", "10.0", 179.1, 8000, (2250, 4500, 4500), 900),
    "h200": _gpu("H200", "9.0", 140.4, 4800, (989, 1979, 1979), 450),
    "h100": _gpu("H100", "9.0", 79.6, 3350, (989, 1979, 1979), 450),
    "a100-40gb": _gpu("A100-SXM4-40GB", "8.0", 40.0, 1555, (312, 0, 624), 300),
    "a100": _gpu("A100", "8.0", 80.0, 2039, (312, 0, 624), 300),
    "l40s": _gpu("L40S", "8.9", 45.0, 864, (362, 733, 733), 32),
    "l4": _gpu("L4", "8.9", 22.5, 300, (121, 242, 242), 32),
    "rtx4090": _gpu("RTX 4090", "8.9", 24.0, 1008, (165, 330, 660), 32),
    "rtx3090": _gpu("RTX 3090", "8.6", 24.0, 936, (71, 0, 284), 32),
    "v4": _tpu("TPU v4", 32, 1228, (275, 275), 90, 4096),
    "v5e": _tpu("TPU v5 lite", 16, 819, (197, 394), 90, 256),
    "v5p": _tpu("TPU v5p", 95, 2765, (459, 918), 180, 8960),
    "v6e": _tpu("TPU v6 lite", 32, 1640, (918, 1836), 180, 256),
}
# JAX has two names for some TPUs; a v5p is always "TPU v5".
_OTHER_NAMES = {
    "TPU v5": "TPU v5p",
    "TPU v5e": "TPU v5 lite",
    "TPU v6e": "TPU v6 lite",
}
# To devices of other hosts: an adapter of 400 Gb/s for each GPU, as hosts of eight have.
NETWORK = 50e9


@dataclass(frozen=True)
class DescribedDevice:
    """A device that need not be there, with what a plan asks of JAX's own."""

    platform: str
    device_kind: str
    compute_capability: str = ""
    memory: int = 0
    """Bytes that JAX would offer."""
    process_index: int = 0
    id: int = field(default=0, compare=False)

    def memory_stats(self) -> dict[str, int]:
        """Returns the memory that programs may use, in JAX's form."""
        return {"bytes_limit": self.memory}


def described_devices(text: str) -> list[DescribedDevice]:
    """Returns the devices of a name such as h100, h200:2 (GPUs) or v5e:4x8 (a slice).

    Raises:
        UsageError: an unknown name, or not a number of devices.
    """
    name, _, shape = text.lower().partition(":")
    if name not in KINDS:
        hint = nearest(name, KINDS)
        raise UsageError(
            f"device={text}: expected one of {listing([*KINDS], 20)}{hint}"
        )
    kind, sizes = KINDS[name], (shape or "1").split("x")
    is_count = all(size.isdecimal() and int(size) for size in sizes) and (
        kind.platform == "tpu" or len(sizes) == 1
    )
    if not is_count or (":" in text and not shape):
        example = f"{name}:4x4" if kind.platform == "tpu" else f"{name}:8"
        raise UsageError(
            f"device={text}: expected a number of devices after the colon, as {example}"
        )
    count = math.prod(map(int, sizes))
    most = kind.linked if kind.platform == "tpu" else 1024
    if count > most:
        raise UsageError(f"device={text}: {count} devices; at most {most} are planned")
    share = GPU_MEMORY_SHARE if kind.platform == "gpu" else 1
    made = DescribedDevice(
        kind.platform,
        kind.device_kind,
        kind.capability,
        int(share * kind.memory_gib * 2**30),
    )
    return [
        DescribedDevice(**{**made.__dict__, "id": number}) for number in range(count)
    ]


def kind_of(device: Any) -> DeviceKind | None:
    """Returns what is known of a device, or None."""
    name: str = device.device_kind
    name = _OTHER_NAMES.get(name, name)
    for kind in KINDS.values():  # whole words: an L40 is no L4
        if re.search(rf"\b{kind.device_kind}\b", name):
            return kind
    return None
