"""Two processes of `train.py`, with two devices each, train as one with four devices does."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from helpers import ROOT
from helpers.commands import call, make_workdir, metrics, start_python, train_flags

from jlora.cli.command import run_command
from jlora.errors import DivergedError, ResourceError, StopRequested, UsageError
from jlora.parallel import lost_process, processes
from jlora.parallel.launch import VARIABLES

STEPS = 60
FLAGS = [
    *("--train.max_steps", STEPS, "--train.save_every", STEPS),
    # Low, so that differences in rounding do not grow.
    *("--optim.learning_rate", 1e-3),
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    return make_workdir(tmp_path_factory.mktemp("processes"))


def start(
    folder: Path, run: str, *more: Any, count: int, index: int, port: int, **env: Any
) -> subprocess.Popen[str]:
    """Starts a process of `train.py`, or of the command whose words follow a run of "-"."""
    several = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
    }
    words = (ROOT / "train.py", *train_flags(run, *FLAGS, *more))
    if run == "-":
        words = more
    devices = f"--xla_force_host_platform_device_count={4 // count}"
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {devices}",
            **(several if count > 1 else {}),
            **env,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start_all(
    folder: Path, run: str, *, count: int, own: Any = None
) -> list[subprocess.Popen[str]]:
    """Starts all processes, each with the arguments that `own` returns for its index."""
    where = {"count": count, "port": free_port()}
    return [
        start(folder, run, *(own(index) if own else ()), **where, index=index)
        for index in range(count)
    ]


def finish(running: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    outputs, errors = zip(*(p.communicate(timeout=240) for p in running), strict=True)
    print(*errors)  # shown if the test fails
    return [(p.returncode, out) for p, out in zip(running, outputs, strict=True)]


def log(folder: Path) -> np.ndarray:
    names = ("step", "loss", "grad_norm", "tokens", "learning_rate")
    return np.array([[line[name] for name in names] for line in metrics(folder)])


@pytest.mark.slow
def test_two_processes_stop_together_resume_and_train_as_one_does(workdir):
    two, one = "two", "one"

    def own(_):
        # Weights and adapters are split over all devices, so over both processes.
        return "--mesh.fsdp", 4, "--lora.lora_dropout", 0.2

    running = start_all(workdir, two, count=2, own=own)
    wait_for(running[0], "step 1/")
    running[1].send_signal(signal.SIGTERM)  # which process 0 does not get
    (first, _), (second, quiet) = finish(running)
    assert (first, second) == (75, 75)
    # The second process prints one line; JAX may print one about its peers.
    printed = [line for line in quiet.splitlines() if "peer ranks" not in line]
    assert printed == ["process 1 of 2: 2 of 4 devices"]
    assert [code for code, _ in finish(start_all(workdir, two, count=2, own=own))] == [
        0,
        0,
    ]
    [(code, _)] = finish(start_all(workdir, one, count=1, own=own))
    assert code == 0
    # Float32 sums are in another order.
    np.testing.assert_allclose(log(workdir / two), log(workdir / one), rtol=1e-4)
    alone, together = (
        json.loads((workdir / run / "adapter" / "adapter_config.json").read_text())
        for run in (one, two)
    )
    assert alone == together


@pytest.mark.slow
def test_processes_with_different_settings_end_before_they_compute(workdir):
    running = start_all(workdir, "other", count=2, own=lambda i: ("--seed", i))
    errors = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [2, 2]
    assert all("processes 1 have other settings" in text for text in errors)
    assert not (workdir / "other").exists()


STEADY = ("--optim.lr_schedule", "constant", "--optim.warmup_ratio", 0)
MANY = ("--train.max_steps", 10_000, "--train.save_every", 1)


def wait_for(running: subprocess.Popen[str], text: str) -> None:
    stdout: Any = running.stdout
    while line := stdout.readline():
        if line.startswith(text):
            return
    raise AssertionError(running.communicate()[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "moment"),
    [
        # While models and data are opened.
        (0, "process 0 of 2"),
        (1, "process 0 of 2"),
        # In a step or a save: each step is saved. Below, it is not the first process.
        (0, "step 5/"),
    ],
)
def test_a_killed_process_ends_the_other_with_one_message(workdir, victim, moment):
    run = f"killed-{victim}-{len(moment)}"
    running = start_all(workdir, run, count=2, own=lambda _: MANY)
    wait_for(running[0], moment)
    running[victim].kill()
    killed_at = time.monotonic()
    other = running[1 - victim]
    _, err = other.communicate(timeout=60)
    assert time.monotonic() - killed_at < 30
    assert other.returncode == ResourceError.exit_status
    ended = ["error: another process of this run has ended, and may have"]
    if moment == "process 0 of 2":  # the other may not know yet that they met
        ended.append("error: the processes of this run did not meet: one did not start")
    assert err.startswith(tuple(ended))
    assert err.count("\n") == 1
    running[victim].communicate()


@pytest.mark.slow
def test_a_run_of_four_processes_goes_on_with_two_and_with_one(workdir):
    running = start_all(workdir, "four", count=4, own=lambda _: (*MANY, *STEADY))
    wait_for(running[0], "step 3/")
    running[2].kill()
    killed_at = time.monotonic()
    others = [process for process in running if process is not running[2]]
    for process in others:
        _, err = process.communicate(timeout=60)
        assert process.returncode == ResourceError.exit_status
        assert err.startswith("error: another process of this run has ended, and may")
        assert err.count("\n") == 1
    assert time.monotonic() - killed_at < 30
    running[2].communicate()
    end = len(metrics(workdir / "four")) + 4
    flags = (*STEADY, "--train.max_steps", end)
    ended = finish(start_all(workdir, "four", count=2, own=lambda _: flags))
    assert {code for code, _ in ended} == {0}
    assert "resuming after step " in ended[0][1]
    flags = (*FLAGS, *STEADY, "--train.max_steps", end + 4)
    with contextlib.chdir(workdir):
        for run, said in (("four", f"resuming after step {end}"), ("whole", "")):
            done = call("train", *train_flags(run, *flags))
            assert (done.status, said in done.out) == (0, True)
    # Float32 sums are in another order.
    np.testing.assert_allclose(log(workdir / "four"), log(workdir / "whole"), rtol=1e-4)


@pytest.mark.slow
def test_two_processes_sweep_continue_an_adapter_and_evaluate_as_one_does(workdir):
    """Over a quantised base, whose weights and rows both processes share."""
    (workdir / "sweep.yaml").write_text("low: {}\nhigh: {optim.learning_rate: 3e-3}\n")
    base = ("--compute.base_dtype", "int8", "--train.max_steps", 4)
    mesh = ("--mesh.data", 1, "--mesh.fsdp", 2, "--mesh.context", 2)
    runs = {
        "sweep": (*base, *mesh, "--sweep", "sweep.yaml"),
        "more": (*base, *mesh, "--init_adapter", "sweep/high"),
    }
    words = [
        *("--model", "hf", "--data", "eval.jsonl", "--data.seq_len", 64),
        *("--base_dtype", "int8", "--adapter", "more", *mesh),
    ]
    for run, flags in runs.items():
        ended = finish(start_all(workdir, run, count=2, own=lambda _, f=flags: f))
        assert {code for code, _ in ended} == {0}
    command = (ROOT / "evaluate.py", *words)
    (code, out), (other, _) = finish(
        start_all(workdir, "-", count=2, own=lambda _: command)
    )
    assert code == other == 0
    with contextlib.chdir(workdir):
        for run, flags in runs.items():
            assert not call("train", *train_flags(f"one-{run}", *FLAGS, *flags)).status
        alone = call("evaluate", *words)
    assert float(out.splitlines()[-1].split()[1]) == pytest.approx(
        float(alone.out.split()[1]), abs=5e-6
    )
    for run in ("sweep/low", "sweep/high", "more"):
        np.testing.assert_allclose(
            log(workdir / run), log(workdir / f"one-{run}"), rtol=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_process_whose_peer_never_starts_ends_after_the_time_it_was_given(
    workdir, index
):
    where = {"count": 2, "index": index, "port": free_port()}
    began = time.monotonic()
    lonely = start(workdir, "lonely", **where, JLORA_START_TIMEOUT="3")
    _, err = lonely.communicate(timeout=60)
    assert time.monotonic() - began < 40
    assert lonely.returncode == ResourceError.exit_status
    assert err == (
        "error: the processes of this run did not meet: one did not start within 3 s, has "
        "ended, or cannot be reached; start all, or wait longer with JLORA_START_TIMEOUT "
        "(seconds)\n"
    )


def launched_by(launcher: str, index: int, port: int) -> dict[str, str]:
    """What a launcher of two processes on this host tells one of them."""
    if launcher == "slurm":
        return {
            "SLURM_JOB_ID": "4101",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(index),
            "SLURM_LOCALID": str(index),
            "JAX_COORDINATOR_PORT": str(port),
        }
    told = {"SIZE": 2, "RANK": index, "LOCAL_RANK": index}
    first = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
    if launcher == "open mpi 4":
        uri = "1531576320.0;tcp://127.0.0.1:34911"
        first = {"OMPI_MCA_orte_hnp_uri": uri, "JAX_COORDINATOR_PORT": str(port)}
    return {f"OMPI_COMM_WORLD_{name}": str(n) for name, n in told.items()} | first


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["slurm", "open mpi 4", "open mpi 5"])
def test_processes_of_a_launcher_meet(launcher):
    code = "from jlora.parallel.processes import joined_processes as j\nwith j(): pass"
    port = free_port()
    running = [
        start_python("-c", code, **launched_by(launcher, index, port))
        for index in range(2)
    ]
    for index, (status, out) in enumerate(finish(running)):
        assert status == 0
        assert out.startswith(f"process {index} of 2: ")


def test_the_workers_of_a_tpu_pod_on_gke_are_known_to_jax(monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster as tpu

    monkeypatch.setattr(tpu, "running_in_cloud_tpu_vm", True)
    for name, value in {
        "TPU_WORKER_HOSTNAMES": "localhost,b,c",
        "TPU_WORKER_ID": "2",
        # One slice; JAX would ask a server for what is not set.
        **dict.fromkeys(("COORDINATOR_ADDRESS", "NUM_SLICES", "SLICE_ID"), ""),
    }.items():
        monkeypatch.setenv(name if "TPU" in name else f"MEGASCALE_{name}", value)
    found: Any = tpu.GkeTpuCluster
    assert found.is_env_present()
    assert (found.get_process_count(), found.get_process_id()) == (3, 2)
    assert found.get_coordinator_address(3, None).startswith("localhost:")


@pytest.mark.slow
def test_a_full_disk_of_the_first_process_ends_the_other(workdir):
    running = start_all(workdir, "full", count=2, own=lambda _: MANY)
    wait_for(running[0], "step 2/")
    resource.prlimit(running[0].pid, resource.RLIMIT_FSIZE, (1000, 1000))
    errors = [process.communicate(timeout=90)[1] for process in running]
    assert [process.returncode for process in running] == [5, 5]
    assert "a file may not become larger" in errors[0]
    assert "another process of this run has ended" in errors[1]
    assert [text.count("\n") for text in errors] == [1, 1]


SETTINGS = {"jax_platforms": "tpu", "update": lambda *_: None}


@dataclass(frozen=True)
class Nothing:
    """A command."""

    seed: int = 0
    """Unused."""


@pytest.fixture
def initialized(monkeypatch) -> list[dict[str, Any]]:
    """The arguments of every call of `jax.distributed.initialize`."""
    found: list[dict[str, Any]] = []

    def initialize(**to: Any) -> None:
        timeouts = [to.pop(name) for name in sorted(to) if "timeout" in name]
        assert timeouts == [20, 300, 20]
        found.append(to)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda _: None)
    return found


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, []),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, []),  # a shell in a job
        ({"SLURM_STEP_NUM_TASKS": "1"}, []),
        ({"SLURM_STEP_NUM_TASKS": "8"}, [{}]),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://a:1"},
            [{}],
        ),
        (
            {
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "JAX_COORDINATOR_ADDRESS": "a:1",
            },
            [
                {
                    "coordinator_address": "a:1",
                    "num_processes": 4,
                    "process_id": 3,
                    "local_device_ids": [1],
                }
            ],
        ),
        ({"SLURM_STEP_NUM_TASKS": "8", "JAX_COORDINATOR_ADDRESS": "a:1"}, [{}]),
        (
            dict(zip(VARIABLES, ("a:1", "4", "3"), strict=True)),
            [{"coordinator_address": "a:1", "num_processes": 4, "process_id": 3}],
        ),
    ],
)
def test_processes_are_joined_if_the_environment_names_several(
    initialized, monkeypatch, environment, expected
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with processes.joined_processes():
        pass
    assert initialized == expected


def test_open_mpi_5_has_to_be_told_the_first_process(initialized, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with (
        pytest.raises(UsageError, match="add -x JAX_COORDINATOR_ADDRESS=HOST:PORT"),
        processes.joined_processes(),
    ):
        pass
    assert initialized == []


@pytest.mark.parametrize(
    "values",
    [
        ("a:1", "", ""),
        ("", "2", "0"),
        ("a:1", "two", "0"),
        ("a", "2", "0"),
        ("a:", "2", "0"),
        (":1", "2", "0"),
    ],
)
def test_incomplete_variables_are_refused(initialized, monkeypatch, values):
    for name, value in zip(VARIABLES, values, strict=True):
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(UsageError, match="set all of JAX_COORDINATOR_ADDRESS"),
        processes.joined_processes(),
    ):
        pass
    assert initialized == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SLURM_STEP_NUM_TASKS", "x", "SLURM_STEP_NUM_TASKS=x: not a number"),
        ("OMPI_COMM_WORLD_SIZE", "-2", "OMPI_COMM_WORLD_SIZE=-2: not a number"),
        ("JAX_COORDINATOR_ADDRESS", "a", "JAX_COORDINATOR_ADDRESS=a: set all of"),
        (
            "JLORA_START_TIMEOUT",
            "5m",
            "JLORA_START_TIMEOUT=5m: not a number of seconds",
        ),
    ],
)
def test_variables_of_a_launcher_are_checked(
    initialized, monkeypatch, name, value, message
):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message), processes.joined_processes():
        pass
    assert initialized == []


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_only_a_tpu_without_other_processes_is_accepted(initialized, monkeypatch, kind):
    message = "coordinator_address should be defined."

    def fail(**_: Any) -> None:
        raise kind(message)

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda _: "libtpu")
    monkeypatch.setattr(processes.jax, "config", SimpleNamespace(**SETTINGS))
    with processes.joined_processes():
        pass
    message = "INVALID_ARGUMENT: process 3 of 2"
    with (
        pytest.raises(UsageError, match="did not meet: INVALID_ARGUMENT"),
        processes.joined_processes(),
    ):
        pass
    message = "DEADLINE_EXCEEDED: Barrier timed out"
    with (
        pytest.raises(ResourceError, match="did not meet: one did not start within"),
        processes.joined_processes(),
    ):
        pass


def test_different_facts_of_processes_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    parts = np.zeros((3, 32), np.uint8)
    gather = lambda digest: parts + digest  # noqa: E731
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
    processes.check_agreement({"seed": 0})
    parts[2] = 1
    with pytest.raises(UsageError, match="processes 2 have other settings"):
        processes.check_agreement({"seed": 0})


JaxError = jax.errors.JaxRuntimeError


@pytest.fixture
def two(initialized, monkeypatch) -> None:
    """Makes this process one of two, which never wait for each other."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(lost_process.multihost_utils, "process_allgather", print)
    monkeypatch.setattr(lost_process, "end_on_abort", print)


@pytest.mark.parametrize(
    "error",
    [
        JaxError("UNKNOWN: Gloo context initialization failed"),
        JaxError("INTERNAL: NCCL operation ncclGroupEnd() failed: remote error"),
        JaxError("UNAVAILABLE: Failed to send RPC to coordination service."),
        JaxError("DEADLINE_EXCEEDED: stopped sending heartbeats"),
        ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"),
    ],
)
def test_a_lost_process_is_reported(two, error):
    with (
        pytest.raises(ResourceError, match="another process of this run has ended"),
        processes.joined_processes(),
    ):
        raise error


@pytest.mark.parametrize(
    "error",
    [ValueError("no connection of shapes"), StopRequested("a"), DivergedError("a")],
)
def test_other_errors_are_not_reported_as_a_lost_process(two, error):
    with pytest.raises(type(error)) as raised, processes.joined_processes():
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Failed to allocate 8 bytes for a NCCL communicator",
        "INTERNAL: NCCL operation failed: Cuda failure 2 'out of memory'",
    ],
)
def test_out_of_memory_is_not_reported_as_a_lost_process(two, capsys, message):
    def main(_: Any) -> None:
        with processes.joined_processes():
            raise jax.errors.JaxRuntimeError(message)

    assert run_command(main, Nothing, argv=[]) == ResourceError.exit_status
    assert "error: out of device memory" in capsys.readouterr().err
