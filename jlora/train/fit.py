"""The steps of one run, or of several together: resume, step, evaluate, save, export.

A single run is the case of one adapter, so both do the same in the same order.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from jax.sharding import Mesh

from jlora.config.run_config import TrainConfig
from jlora.data import Dataset
from jlora.errors import DivergedError, StopRequested, listing
from jlora.lora.adapter_tree import Params, is_adapter, is_trainable, map_leaves
from jlora.model.llama import Llama
from jlora.parallel.processes import StopVote, check_agreement, is_first, to_host
from jlora.report.run_report import Report
from jlora.train.checkpoint import RunCheckpoints
from jlora.train.loop import StepLog, check_remaining, clear_outcome, is_due
from jlora.train.optimizer import make_schedule
from jlora.train.prefetch import Prefetch
from jlora.train.resuming import locked, resume_all
from jlora.train.step import TrainState, evaluate, make_eval_step
from jlora.train.sweep import Alone, Member, Sweep, make_trainer


@dataclass(frozen=True)
class Entry:
    """One adapter to train, and the run folder it is trained in."""

    name: str
    """In a sweep; empty for a single run."""
    folder: Path
    member: Member
    meta: dict[str, Any]
    """What is noted in its checkpoints; see `jlora.train.resuming.resume`."""
    data: Dataset
    held_out: Dataset | None
    flops_per_token: float


def fit(
    entries: Sequence[Entry],
    model: Llama,
    mesh: Mesh,
    config: TrainConfig,
    *,
    total_steps: int,
    packed: bool,
    mode: str,
    stop: threading.Event,
    export: Callable[[int, Params], None],
) -> None:
    """Trains the adapters from their newest checkpoint, or their start, to the end.

    Args:
        entries: what to train, together if there are several.
        model: the forward pass.
        mesh: devices.
        config: how often to do what.
        total_steps: where training ends.
        packed: whether rows hold several documents.
        mode: of resuming; see `jlora.train.resuming.resume`.
        stop: set when asked to stop, at any time.
        export: called with the index and the whole tree of every adapter at the end.

    Raises:
        StopRequested: when asked to, after saving.
        DivergedError: naming adapters that diverged; the others are exported.
        UsageError, CorruptError: as `jlora.train.resuming.resume`.
    """
    with ExitStack() as stack:
        for entry in entries:
            stack.enter_context(locked(entry.folder))
        states = resume_all(
            [entry.folder for entry in entries],
            [entry.member.state for entry in entries],
            [entry.meta for entry in entries],
            mode=mode,
        )
        start = int(states[0].step)
        check_agreement([start, [entry.meta for entry in entries]])
        check_remaining(entries[0].folder, start, total_steps)
        for entry in entries:
            if start < total_steps and is_first():
                clear_outcome(entry.folder)
            write_settings(entry.folder, entry.meta["settings"])
        datasets = list({id(entry.data): entry.data for entry in entries}.values())
        trainer = make_trainer(
            [replace(e.member, state=s) for e, s in zip(entries, states, strict=True)],
            model,
            mesh,
            total_steps=total_steps,
            orders=[datasets.index(entry.data) for entry in entries],
            packed=packed,
            grad_accum_steps=config.grad_accum_steps,
        )
        runs: list[_Run] = []
        for index, entry in enumerate(entries):
            run = _Run(entry, index, config, start, total_steps, beside=runs)
            runs.append(stack.enter_context(run))
        steps = _Steps(trainer, runs, config, total_steps, model, mesh, packed)
        state = steps.run(datasets, start, stop)
        for index, run in enumerate(runs):
            if not run.error:
                tuned = _adapter_on_host(trainer.tuned(state, index))
                if is_first():
                    export(index, tuned)
    _raise_diverged(runs)


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Writes config.yaml, which --config takes back."""
    if is_first():
        text = yaml.safe_dump(settings, sort_keys=False)
        (folder / "config.yaml").write_text(text)


def _adapter_on_host(params: Params) -> Params:
    """Returns the tree with whole adapters, of which a process may hold parts only."""
    return map_leaves(
        lambda path, leaf: (
            to_host(leaf) if is_adapter(path[-1]) or is_trainable(path[-1]) else leaf
        ),
        params,
    )


class _Run:
    """The log and the checkpoints of one adapter, alone or beside others."""

    def __init__(
        self,
        entry: Entry,
        index: int,
        config: TrainConfig,
        start: int,
        total_steps: int,
        *,
        beside: Sequence["_Run"],
    ) -> None:
        self.entry = entry
        self.error: DivergedError | None = None
        self._checkpoints = RunCheckpoints(entry.folder / "checkpoints", config.keep)
        self.report = Report(
            entry.folder,
            total_steps=total_steps,
            start_step=start,
            name=entry.name,
            beside=beside[0].report if beside else None,
        )
        self._log = StepLog(
            self.report,
            make_schedule(entry.member.optim, total_steps),
            flops_per_token=entry.flops_per_token,
            steps_per_epoch=entry.data.steps_per_epoch,
            log_every=config.log_every,
            total_steps=total_steps,
            index=index,
        )

    def __enter__(self) -> "_Run":
        self.report.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.report.__exit__(*error)
        self._checkpoints.close()

    def add(self, step: int, metrics: dict[str, Any], waited_s: float) -> None:
        """Logs the step before and keeps this one; see `StepLog.add`."""
        self.flush()
        if not self.error:
            self._log.add(step, metrics, waited_s)

    def flush(self) -> None:
        """Logs what is pending, and notes when too many steps were not finite."""
        if self.error:
            return
        try:
            self._log.flush()
        except DivergedError as error:
            self.error = error
            if self.entry.name:  # the others go on
                self.report.say(str(error))

    def save(self, step: int, state: TrainState) -> None:
        """Writes a checkpoint; of a diverged run, too, so that all have the same."""
        self._checkpoints.save(step, state, self.entry.meta)


class _Steps:
    """What happens at and after every step."""

    def __init__(
        self,
        trainer: Alone | Sweep,
        runs: Sequence[_Run],
        config: TrainConfig,
        total_steps: int,
        model: Llama,
        mesh: Mesh,
        packed: bool,
    ) -> None:
        self._trainer, self._runs, self._config = trainer, runs, config
        self._total_steps, self._mesh = total_steps, mesh
        params = trainer.parameters(trainer.state, 0)
        self._eval_step = make_eval_step(model, mesh, params=params, packed=packed)

    def run(
        self, datasets: Sequence[Dataset], start: int, stop: threading.Event
    ) -> TrainState:
        """Returns the state after the last step."""
        state, last = self._trainer.state, self._total_steps
        is_asked = StopVote(stop)
        with ExitStack() as stack:
            streams = [
                stack.enter_context(Prefetch(data, self._mesh, start=start, stop=last))
                for data in datasets
            ]
            for done, batches in enumerate(zip(*streams, strict=True), start + 1):
                state, metrics = self._trainer.step(
                    state, self._trainer.frozen, list(batches)
                )
                waited_s = sum(stream.waited_s for stream in streams)
                for run in self._runs:
                    run.add(done, metrics, waited_s)
                stopping = is_asked() and done < last
                if not stopping and is_due(done, self._config.eval_every, last):
                    self._evaluate(done, state)
                # Saved after the evaluation, which a resumed run does not repeat.
                if stopping or is_due(done, self._config.save_every, last):
                    self._save(done, state)
                if all(run.error for run in self._runs):
                    _raise_diverged(self._runs)
                if stopping:
                    raise StopRequested(f"step {done} is saved; run it again to go on")
        return state

    def _evaluate(self, step: int, state: TrainState) -> None:
        for index, run in enumerate(self._runs):
            run.flush()
            if run.entry.held_out is not None and not run.error:
                params = self._trainer.parameters(state, index)
                loss, _ = evaluate(
                    self._eval_step, params, run.entry.held_out, self._mesh
                )
                run.report.log(step=step, eval_loss=loss)

    def _save(self, step: int, state: TrainState) -> None:
        for run in self._runs:
            run.flush()
        if not all(run.error for run in self._runs):
            for index, run in enumerate(self._runs):
                run.save(step, self._trainer.member(state, index))


def _raise_diverged(runs: Sequence[_Run]) -> None:
    lost = [run for run in runs if run.error]
    if not lost:
        return
    if lost[0].error and not lost[0].entry.name:
        raise lost[0].error
    names = listing([run.entry.name for run in lost])
    raise DivergedError(
        f"{len(lost)} of {len(runs)} adapters diverged and are not written: {names}"
    )
