"""Meshes of devices that this machine does not have."""

from unittest.mock import Mock

import numpy as np
from jax.sharding import Mesh

from jlora.parallel.sharding import MESH_AXES


def mesh_of(
    platform: str, sizes: tuple[int, int, int] = (1, 1, 1), capability: str = ""
) -> Mesh:
    devices = np.empty(sizes, object)
    for place in np.ndindex(sizes):
        devices[place] = Mock(
            platform=platform, compute_capability=capability, device_kind="a device"
        )
    return Mesh(devices, MESH_AXES)
