"""Several processes that train as one, on one host or many.

They are started by a launcher that JAX knows (Slurm, Open MPI, TPU pods), or by hand with
three environment variables (`jlora.parallel.launch`). All of them read the same files and
compute the same steps; only the first prints and writes.
"""

import hashlib
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jlora.errors import ResourceError, UsageError, listing, without_warnings
from jlora.parallel.launch import (
    START_TIMEOUT,
    addresses,
    given_variables,
    is_launched,
    start_timeout_s,
)
from jlora.parallel.lost_process import (
    HEARTBEAT_TIMEOUT_S,
    end_on_abort,
    ends_with_the_others,
)

# In what JAX raises if there are no other processes.
_NO_CLUSTER = "coordinator_address should be defined"


@contextmanager
def joined_processes() -> Iterator[None]:
    """Connects the processes of this run, before any of them uses a device.

    Raises:
        UsageError: the variables contradict each other, or processes do not connect.
        ResourceError: another process ended, or cannot be reached.
    """
    given, launched = given_variables(), is_launched()
    config: Any = jax.config
    on_tpu = importlib.util.find_spec("libtpu") and config.jax_platforms != "cpu"
    if not (given or launched or on_tpu):
        yield
        return
    # Its handler of SIGTERM would replace ours, see `stop_vote`.
    config.update("jax_enable_preemption_service", False)
    timeout_s = start_timeout_s()
    late = (
        "the processes of this run did not meet: one did not start within "
        f"{timeout_s} s, has ended, or cannot be reached; start all, or wait longer with "
        f"{START_TIMEOUT} (seconds)"
    )
    end_on_abort(late)
    try:
        jax.distributed.initialize(
            **addresses(given, launched=launched),
            initialization_timeout=timeout_s,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        )
    except (RuntimeError, ValueError) as error:
        if "DEADLINE_EXCEEDED" in str(error):
            raise ResourceError(late) from error
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
        quiet = ExitStack()
        if not is_first():
            quiet.enter_context(redirect_stdout(nowhere))
            quiet.enter_context(without_warnings())
        with quiet, ends_with_the_others():
            yield


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
