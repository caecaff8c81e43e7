"""Several processes that train as one, on one host or many.

They are joined where the environment tells of them: by a launcher that JAX knows (Slurm,
Open MPI, TPU pods) or by three variables. All do the same on what lies on a storage that
they share; only the first one prints and writes.
"""

import hashlib
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jlora.errors import ResourceError, UsageError, is_out_of_memory, listing

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# How many processes `srun` and `mpirun` started; absent in a shell inside a Slurm job.
_LAUNCHED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
# What JAX raises where nothing tells of other processes.
_NO_CLUSTER = "coordinator_address should be defined"
# Words of what JAX raises when another process does not answer.
_LOST = ("gloo", "nccl", "coordination", "heartbeat", "connection")


@contextmanager
def joined_processes() -> Iterator[None]:
    """Joins the processes of this run; has to come before any use of a device.

    Raises:
        UsageError: variables that do not fit together, or processes that do not come.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    launched = max(map(_launched_count, _LAUNCHED)) > 1
    config: Any = jax.config
    on_tpu = importlib.util.find_spec("libtpu") and config.jax_platforms != "cpu"
    if not (given or launched or on_tpu):
        yield
        return
    # Its handler would take SIGTERM, which `StopVote` makes known to all.
    config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**_explicit(given, launched=launched))
    except (RuntimeError, ValueError) as error:
        if given or launched or _NO_CLUSTER not in str(error):
            first = str(error).splitlines()[0]
            raise UsageError(
                f"the processes of this run did not meet: {first}"
            ) from error
    print(
        f"process {jax.process_index()} of {jax.process_count()}: "
        f"{jax.local_device_count()} of {jax.device_count()} devices",
        flush=True,
    )
    with open(os.devnull, "w") as nowhere:
        sys.stdout.flush()
        with redirect_stdout(sys.stdout if is_first() else nowhere), _told_of_lost():
            yield


@contextmanager
def _told_of_lost() -> Iterator[None]:
    """Turns what JAX says when a process has ended into a message."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        first = str(error).splitlines()[0]
        is_lost = any(word in first.lower() for word in _LOST)
        if is_out_of_memory(error) or not is_lost:
            raise
        raise ResourceError(
            "another process of this run has ended, and may have said why, or cannot be "
            f"reached ({first[:200]})"
        ) from error


def _launched_count(name: str) -> int:
    """Returns how many processes a launcher's variable tells of."""
    text = os.environ.get(name) or "1"
    if not text.isdecimal():
        raise UsageError(
            f"{name}={text}: not a number of processes; unset it, or let the launcher set it"
        )
    return int(text)


def _explicit(given: dict[str, str], *, launched: bool) -> dict[str, Any]:
    """Returns what the variables say; with a launcher JAX finds the rest itself."""
    address, *numbers = (given.get(name, "") for name in VARIABLES)
    host, _, port = address.rpartition(":")
    has_address = bool(host) and port.isdecimal()
    missing = [name for name in VARIABLES if name not in given]
    # JAX takes an address beside a launcher, too.
    if not given or (launched and missing and (has_address or not address)):
        return {}
    if not has_address or not all(number.isdecimal() for number in numbers):
        raise UsageError(
            f"{listing([f'{k}={v}' for k, v in given.items()])}: set all of "
            f"{listing(VARIABLES)} (HOST:PORT of the first process, how many there are, "
            "and which this is, from 0), or none of them"
        )
    count, index = map(int, numbers)
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
    }


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def to_host(leaf: Any) -> np.ndarray:
    """Returns a whole array, wherever its parts are; all processes have to ask for it."""
    if isinstance(leaf, jax.Array) and not (
        leaf.is_fully_addressable or leaf.is_fully_replicated
    ):
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def check_agreement(facts: Any) -> None:
    """Raises UsageError where the processes would not do the same."""
    if jax.process_count() == 1:
        return
    text = json.dumps(facts, sort_keys=True, default=str)
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    every = np.asarray(multihost_utils.process_allgather(digest))
    others = np.flatnonzero((every != every[0]).any(axis=1)).tolist()
    if others:
        raise UsageError(
            f"processes {listing(others)} have other settings, data, weights, "
            "library versions or checkpoints than process 0; start all with the same "
            "command, on the same files, with an output_dir that they share"
        )


class StopVote:
    """Whether any process has been asked to stop, which all learn at the same step."""

    def __init__(self, stop: threading.Event) -> None:
        """Takes the event of this process."""
        self._stop = stop
        self._pending: jax.Array | None = None
        mesh = jax.make_mesh((jax.device_count(),), ("all",))
        self._parts = NamedSharding(mesh, PartitionSpec("all"))
        self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self) -> bool:
        """Returns whether to stop; among several processes one step late.

        So that no step waits for the answer, which is that of the call before.
        """
        asked = self._stop.is_set()
        if jax.process_count() == 1:
            return asked
        mine = np.full(jax.local_device_count(), asked, np.int32)
        every = jax.make_array_from_process_local_data(self._parts, mine)
        before, self._pending = self._pending, self._any(every)
        return before is not None and bool(before)
