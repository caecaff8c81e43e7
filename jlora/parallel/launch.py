"""How the processes of a run were started, as the environment says it. Imports no JAX."""

import os
from typing import Any

from jlora.errors import UsageError, listing

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
START_TIMEOUT = "JLORA_START_TIMEOUT"
# The number of processes that `srun` or `mpirun` started; a shell in a Slurm job has none.
_LAUNCHED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
# By this JAX knows Open MPI, and finds the first process. Open MPI 5 does not set it.
_OPEN_MPI_4 = "OMPI_MCA_orte_hnp_uri"


def given_variables() -> dict[str, str]:
    """Returns those of `VARIABLES` that are set."""
    return {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}


def is_launched() -> bool:
    """Whether a launcher that JAX knows started several processes."""
    return max(_number(name, "processes", 1) for name in _LAUNCHED) > 1


def start_timeout_s() -> int:
    """Returns for how many seconds the processes of a run wait for each other to start."""
    return _number(START_TIMEOUT, "seconds", 300)


def hide_log_of_aborts() -> None:
    """Keeps JAX's C++ from logging, in a run of several processes, before it aborts one.

    `jlora.parallel.lost_process` says instead what happened. It has to be called before
    JAX is imported.
    """
    several = given_variables() or is_launched()
    if several and os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # JAX's default
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "4"


def _number(name: str, what: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UsageError(
            f"{name}={text}: not a number of {what}; unset it, or let the launcher set it"
        )
    return int(text)


def _is_open_mpi_5() -> bool:
    several = _number("OMPI_COMM_WORLD_SIZE", "processes", 1) > 1
    return several and _OPEN_MPI_4 not in os.environ


def addresses(given: dict[str, str], *, launched: bool) -> dict[str, Any]:
    """Returns JAX's arguments from the variables; with a launcher that it knows, none.

    Raises:
        UsageError: some are missing, or malformed.
    """
    address, *numbers = (given.get(name, "") for name in VARIABLES)
    host, _, port = address.rpartition(":")
    has_address = bool(host) and port.isdecimal()
    missing = [name for name in VARIABLES if name not in given]
    if _is_open_mpi_5() and set(missing) >= set(VARIABLES[1:]):
        if not has_address:
            raise UsageError(
                f"Open MPI 5 does not say where the first process is: add -x {VARIABLES[0]}="
                "HOST:PORT to mpirun, a host name and a free port of its first host"
            )
        return {
            "coordinator_address": address,
            "num_processes": _number("OMPI_COMM_WORLD_SIZE", "processes", 1),
            "process_id": _number("OMPI_COMM_WORLD_RANK", "processes", 0),
            # One device for each process, as JAX does with the launchers that it knows.
            "local_device_ids": [_number("OMPI_COMM_WORLD_LOCAL_RANK", "devices", 0)],
        }
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
