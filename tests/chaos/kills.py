"""Processes ended by SIGKILL at random moments, and what the next one makes of it."""

import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from helpers.adapters import files
from helpers.commands import adapter_bytes, losses, train_flags

from chaos.lab import PATIENCE_S, Lab, Started

STEPS = 8


def training_flags(run: object, steps: int = STEPS) -> list[object]:
    """A short run that saves after every step, so that most kills meet a save.

    A step does not depend on how many there will be.
    """
    every = ("--train.save_every", 1, "--train.max_steps", steps)
    rate = ("--optim.lr_schedule", "constant", "--optim.warmup_ratio", 0)
    return train_flags(run, "--data.cache_dir", "cache", *every, *rate)


def kill_training(lab: Lab, kills: int, *, count: int = 1) -> None:
    """Kills a run up to three times before it may end; `count` processes train together."""
    what = "train, save, export" + (f", {count} processes" if count > 1 else "")
    whole, run = (lab.folder / f"{name}{count}" for name in ("whole", "run"))
    _check(_start_all(lab, whole, count))
    while kills > 0:
        shutil.rmtree(run, ignore_errors=True)
        times = min(kills, lab.random.randint(1, 3))
        killed = sum(_kill_run(lab, run, count) for _ in range(times))
        kills -= killed
        last = [each.wait() for each in _start_all(lab, run, count)]
        same = all(each.status == 0 for each in last) and (
            adapter_bytes(run) == adapter_bytes(whole) and losses(run) == losses(whole)
        )
        detail = " ".join(each.text[-500:] for each in last)
        for _ in range(killed):
            lab.count(what, "same result" if same else "another result", detail)


def _start_all(lab: Lab, run: Path, count: int) -> list[Started]:
    flags = training_flags(run)
    if count == 1:
        return [lab.start("train", flags)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    several = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
    }
    each = (several | {"JAX_PROCESS_ID": str(index)} for index in range(count))
    return [lab.start("train", flags, **environment) for environment in each]


def _check(running: list[Started]) -> None:
    for each in running:
        if each.wait().status != 0:
            raise RuntimeError(f"a command fails by itself:\n{each.text}")


def _kill_run(lab: Lab, run: Path, count: int) -> bool:
    step = lab.random.randint(0, STEPS)
    # Before the first step: anywhere in the start. Later: in the step, save or export.
    delay = lab.random.random() * (0.5 if step else 3)
    running = _start_all(lab, run, count)
    wanted = tuple(f"step {n}/" for n in range(step, STEPS + 1))

    def is_there() -> bool:
        return not step or any(line in running[0].text for line in wanted)

    return _kill(lab, running, is_there, delay)


def _kill(
    lab: Lab, running: list[Started], is_there: Callable[[], bool], delay: float
) -> bool:
    """Kills the processes one after another; returns whether one was still running."""
    ends = time.monotonic() + PATIENCE_S
    while not is_there() and any(each.status is None for each in running):
        if time.monotonic() > ends:
            raise TimeoutError(f"a command hangs:\n{running[0].text}")
        time.sleep(0.002)
    time.sleep(delay)
    for index, each in enumerate(lab.random.sample(running, len(running))):
        time.sleep(lab.random.random() * 0.2 if index else 0)
        each.process.kill()
    return any(each.wait().status == -signal.SIGKILL for each in running)


def kill_writing(
    lab: Lab, kills: int, name: str, flags_of: Callable[[Path], list[object]], *old: str
) -> None:
    """Kills a command that writes a folder, half of the times over an older one.

    Args:
        lab: where.
        kills: how often.
        name: the command.
        flags_of: its flags, by the folder that it writes.
        old: more of them, which make the older folder.
    """
    out, *wanted = (lab.folder / f"{word}-{name}" for word in ("out", "new", "old"))
    for folder, more in zip(wanted, ((), old), strict=True):
        _check([lab.start(name, [*flags_of(folder), *more])])
    new, before = map(files, wanted)
    partial = out.with_name(f".{out.name}.partial")
    started = lab.start(name, flags_of(out))
    while not partial.exists() and started.status is None:
        time.sleep(0.001)
    began = time.monotonic()
    _check([started])
    span = time.monotonic() - began
    while kills > 0:
        shutil.rmtree(out, ignore_errors=True)
        allowed = [new, {}]
        if lab.random.random() < 0.5:
            shutil.copytree(wanted[1], out)
            allowed = [new, before]
        left = _files(partial)
        running = [lab.start(name, [*flags_of(out), "--overwrite"])]
        delay = lab.random.random() * span
        if not _kill(lab, running, lambda left=left: _files(partial) != left, delay):
            continue
        kills -= 1
        found = _files(out)
        again = lab.run(name, [*flags_of(out), "--overwrite"])
        if found not in allowed:
            lab.count(name, "a half-written folder", sorted(found))
        elif again.status == 0 and files(out) == new:
            lab.count(name, "same result")
        else:
            lab.count(name, "another result", again.text[-500:])


def _files(folder: Path) -> dict[str, bytes]:
    """Returns the files of a folder that another process may be changing."""
    try:
        return files(folder)
    except FileNotFoundError:
        return _files(folder)
