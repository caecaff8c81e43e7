"""Several processes that train as one, on one host or many.

They are started by a launcher that JAX knows (Slurm, Open MPI, TPU pods), or by hand with
three environment variables. All of them read the same files and compute the same steps;
only the first prints and writes.
"""

import hashlib
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jlora.errors import ResourceError, UsageError, is_out_of_memory, listing

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# The number of processes that `srun` or `mpirun` started; a shell in a Slurm job has none.
_LAUNCHED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
# In what JAX raises if there are no other processes.
_NO_CLUSTER = "coordinator_address should be defined"
# In what JAX raises if another process does not answer.
_LOST = ("gloo", "nccl", "coordination", "heartbeat", "connection")


@contextmanager
def joined_processes() -> Iterator[None]:
    """Connects the processes of this run, before any of them uses a device.

    Raises:
        UsageError: the variables contradict each other, or processes do not connect.
        ResourceError: another process ended, or cannot be reached.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    launched = max(map(_launched_count, _LAUNCHED)) > 1
    config: Any = jax.config
    on_tpu = importlib.util.find_spec("libtpu") and config.jax_platforms != "cpu"
    if not (given or launched or on_tpu):
        yield
        return
    # Its handler of SIGTERM would replace ours, see `stop_vote`.
    config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**_addresses(given, launched=launched))
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
        with redirect_stdout(sys.stdout if is_first() else nowhere), _lost_process():
            yield


@contextmanager
def _lost_process() -> Iterator[None]:
    """Raises ResourceError for what JAX raises if another process has ended."""
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
    """Returns the number of processes in a launcher's variable; 1 if there is none."""
    text = os.environ.get(name) or "1"
    if not text.isdecimal():
        raise UsageError(
            f"{name}={text}: not a number of processes; unset it, or let the launcher set it"
        )
    return int(text)


def _addresses(given: dict[str, str], *, launched: bool) -> dict[str, Any]:
    """Returns JAX's arguments from the variables; with a launcher, JAX needs none."""
    address, *numbers = (given.get(name, "") for name in VARIABLES)
    host, _, port = address.rpartition(":")
    has_address = bool(host) and port.isdecimal()
    missing = [name for name in VARIABLES if name not in given]
    # JAX itself reads an address that is given in addition to a launcher.
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
    """Returns a whole array, of which processes may hold parts; all have to call it."""
    if isinstance(leaf, jax.Array) and not (
        leaf.is_fully_addressable or leaf.is_fully_replicated
    ):
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def check_agreement(facts: Any) -> None:
    """Raises UsageError if `facts`, such as settings, differ between the processes."""
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


def stop_vote(stop: threading.Event) -> Callable[[], bool]:
    """Returns a function that tells, at every step, whether any process was asked to stop.

    All processes get the same answer. With several it is one step late, so that no step
    waits for it.

    Args:
        stop: set if this process was asked.
    """
    if jax.process_count() == 1:
        return stop.is_set
    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    parts = NamedSharding(mesh, PartitionSpec("all"))
    any_asked = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
    pending: list[jax.Array] = []

    def is_asked() -> bool:
        mine = np.full(jax.local_device_count(), stop.is_set(), np.int32)
        pending.append(any_asked(jax.make_array_from_process_local_data(parts, mine)))
        return len(pending) > 1 and bool(pending.pop(0))

    return is_asked
