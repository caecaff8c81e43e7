"""Meshes of devices that this machine does not have."""

from unittest.mock import Mock

import numpy as np
from jax.sharding import Mesh

from jlora.parallel.sharding import MESH_AXES


def mesh_of(
    platform: str, sizes: tuple[int, int, int] = (1, 1, 1), capability: str = ""
) -> Mesh:
    data, fsdp, tensor = sizes
    shape = data, fsdp, 1, tensor
    devices = np.empty(shape, object)
    for place in np.ndindex(shape):
        devices[place] = Mock(
            platform=platform, compute_capability=capability, device_kind="a device"
        )
    return Mesh(devices, MESH_AXES)
