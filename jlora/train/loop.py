"""The life of a run: resume, then batches, step, log, evaluate, save, stop and export.

A sweep trains several adapters at once, so the loop takes a list of runs: one per adapter.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from jlora.config.run_config import TrainConfig
from jlora.errors import DivergedError, StopRequested, UsageError, listing
from jlora.lora.adapter_tree import Params, base_of, join
from jlora.model.llama import Llama
from jlora.parallel.processes import check_agreement, is_first, stop_vote
from jlora.report.html_report import TARGET, write_report
from jlora.train.evaluation import Evaluator
from jlora.train.pauses import Pauses
from jlora.train.prefetch import Prefetch
from jlora.train.progress import Progress
from jlora.train.resuming import locked, record_export, resume_all
from jlora.train.run import Run
from jlora.train.step import Batch, TrainState
from jlora.train.step_log import is_due
from jlora.train.stopping import WHILE_TRAINING, StopRequest
from jlora.train.sweep import make_sweep_trainer
from jlora.train.text_samples import Generate, TextSamples
from jlora.train.trainer import Trainer, make_trainer


def train_runs(
    runs: Sequence[Run],
    model: Llama,
    mesh: Mesh,
    config: TrainConfig,
    *,
    total_steps: int,
    packed: bool,
    resume: str,
    stop: StopRequest,
    generate: Generate | None,
    export: Callable[[Run, Params, int], None],
    conclude: Callable[..., None],
) -> None:
    """Trains the adapters from their newest common checkpoint, or step 0, to the end.

    Args:
        runs: what to train, together if there are several.
        model: the forward pass.
        mesh: devices.
        config: how often to log, evaluate and save.
        total_steps: where training ends.
        packed: whether rows hold several documents.
        resume: auto, must or never; see `jlora.train.resuming.resume_all`.
        stop: set when asked to stop, at any time.
        generate: answers held-out prompts, before the first step and at the end.
        export: called at the end with each run that did not diverge, its whole tree and
            the step that it is of, in the first process only.
        conclude: called after that with the runs, the seconds that each kind of work took,
            and `ended_early`: whether patience ended before the steps did.

    Raises:
        StopRequested: when asked to, after saving.
        DivergedError: naming adapters that diverged; the others are exported.
        UsageError, CorruptError: as `resume_all`.
    """
    pauses = Pauses(runs)
    samples = TextSamples(generate, pauses)
    with ExitStack() as stack:
        for run in runs:
            stack.enter_context(locked(run.folder))
        steps_done = _resume(runs, resume, total_steps)
        trainer = _make_trainer(runs, model, mesh, config, total_steps, packed)
        state = trainer.state
        evaluator = Evaluator(model, mesh, packed=packed, compiling=pauses.compiling)
        for run in runs:
            stack.enter_context(run.open(config, steps_done, total_steps, runs))
        stack.push(partial(_end_trackers, runs))
        is_asked = stop_vote(stop)
        if config.eval_at_start and not steps_done:
            stop.check()
            _evaluate(runs, trainer, state, 0, evaluator, pauses)
        for index, run in enumerate(() if steps_done else runs):
            with stop.ends_body():
                samples.take(run.report, trainer.parameters(state, index), 0)
        step = steps_done
        last = steps_done if _patience_is_over(runs) else total_steps
        stream = _batches(runs, mesh, steps_done, last)
        for step, batches, waited_s in stack.enter_context(closing(stream)):
            if step == steps_done + 1:
                stop.check()
                with pauses.compiling("the train step"):
                    trainer = trainer.compiled(state, batches)
                stop.check()
                stop.answer = WHILE_TRAINING
            state, metrics = trainer.step(state, batches)
            for run in runs:
                run.log(step, metrics, waited_s)
            stopping = is_asked() and step < total_steps
            if stopping:  # saved at once: who asked to stop may not wait for long
                _save(runs, trainer, state, step, pauses)
            evaluating = is_due(step, config.eval_every, total_steps)
            if evaluating:
                _evaluate(runs, trainer, state, step, evaluator, pauses)
            is_over = _patience_is_over(runs)
            for run in runs if is_over else ():
                run.flush(is_last=True)
            saving = is_due(step, config.save_every, total_steps) and not stopping
            if evaluating:  # what it found is saved with it
                saving |= stopping or any(run.has_new_best for run in runs)
            # So that `adapter/` is of the newest checkpoint, also where the last one diverges.
            saving |= is_over and not stopping
            if saving:
                _save(runs, trainer, state, step, pauses)
            if all(run.error for run in runs):
                _write_reports(runs)
                _raise_diverged(runs)
            if is_over:
                break
            if stopping:
                _write_reports(runs)
                raise StopRequested(f"step {step} is saved; run it again to go on")
        base = base_of(trainer.frozen)
        for index, run in enumerate(runs):
            if not run.error:
                params, held = run.trained_params(trainer.adapter_state(state, index))
                samples.take(run.report, join(base, params), held)
                if is_first():
                    export(run, params, held)
                    record_export(run.folder, step, held)
            figures = {**run.progress.figures, "training_s": run.training_s}
            run.report.tracking.summarise(figures, step)
        _write_reports(runs)  # before trackers are waited for
    pauses.seconds["training"] = runs[0].training_s
    conclude(runs, pauses.seconds, ended_early=step < total_steps)
    _raise_diverged(runs)


def _resume(runs: Sequence[Run], mode: str, total_steps: int) -> int:
    """Gives every run its newest common state; returns the steps done so far."""
    found = resume_all(
        [run.folder for run in runs],
        [run.adapter.state for run in runs],
        [run.meta for run in runs],
        mode=mode,
    )
    steps_done = int(found[0][0].step)
    check_agreement([steps_done, [run.meta for run in runs]])
    if steps_done > total_steps:
        raise UsageError(
            f"{runs[0].folder}: the run is at step {steps_done} already, and this command "
            f"ends at step {total_steps}; give more steps (train.max_steps, "
            "train.num_epochs), or another output_dir"
        )
    if steps_done == total_steps:
        print(f"all {total_steps} steps are done; only the adapter is written again")
    for run, (state, progress) in zip(runs, found, strict=True):
        run.adapter = replace(run.adapter, state=state)
        run.progress = Progress(**progress)
    return steps_done


def _make_trainer(
    runs: Sequence[Run],
    model: Llama,
    mesh: Mesh,
    config: TrainConfig,
    total_steps: int,
    packed: bool,
) -> Trainer:
    """Returns the trainer of one run, or of the adapters of a sweep together."""
    settings: dict[str, Any] = {
        "total_steps": total_steps,
        "packed": packed,
        "grad_accum_steps": config.grad_accum_steps,
    }
    if len(runs) == 1:
        trainer = make_trainer(runs[0].adapter, model, mesh, **settings)
        _keep_shapes(runs[0], of_state=False)
        return trainer
    orders = list(_datasets(runs))
    trainer = make_sweep_trainer(
        [run.adapter for run in runs],
        model,
        mesh,
        orders=[orders.index(id(run.data)) for run in runs],
        **settings,
    )
    for run in runs:
        _keep_shapes(run, of_state=True)
    return trainer


def _keep_shapes(run: Run, *, of_state: bool) -> None:
    """Lets go of what the trainer has stacked, which would take memory twice."""
    state, frozen = run.adapter.state, run.adapter.frozen
    state = jax.tree.map(jax.typeof, state) if of_state else state
    frozen = join(jax.tree.map(jax.typeof, base_of(frozen)), frozen)
    run.adapter = replace(run.adapter, state=state, frozen=frozen)


def _batches(
    runs: Sequence[Run], mesh: Mesh, steps_done: int, total_steps: int
) -> Generator[tuple[int, list[Batch], float], None, None]:
    """Yields (step, a batch of every data set, seconds waited for batches so far)."""
    with ExitStack() as stack:
        streams = [
            stack.enter_context(
                Prefetch(data, mesh, start=steps_done, stop=total_steps)
            )
            for data in _datasets(runs).values()
        ]
        for step, batches in enumerate(zip(*streams, strict=True), steps_done + 1):
            yield step, list(batches), sum(stream.waited_s for stream in streams)


def _datasets(runs: Sequence[Run]) -> dict[int, Any]:
    """Returns the data sets by identity: runs with the same seed share one."""
    return {id(run.data): run.data for run in runs}


def _evaluate(
    runs: Sequence[Run],
    trainer: Trainer,
    state: TrainState,
    step: int,
    evaluator: Evaluator,
    pauses: Pauses,
) -> None:
    """Logs the loss of every run that has held-out data, and has not diverged."""
    for index, run in enumerate(runs):
        if run.held_out is not None and not run.error:
            params = trainer.parameters(state, index)
            evaluator.prepare(params, run.held_out)
            with pauses.spent("evaluating"):
                run.evaluate(evaluator, step, params)


def _patience_is_over(runs: Sequence[Run]) -> bool:
    """Whether no run that is left had a better evaluation for as long as it may wait."""
    left = [run for run in runs if not run.error]
    return bool(left) and all(run.is_out_of_patience for run in left)


def _save(
    runs: Sequence[Run],
    trainer: Trainer,
    state: TrainState,
    step: int,
    pauses: Pauses,
) -> None:
    """Writes a checkpoint of every run, unless all have diverged.

    One that has diverged is saved as well, so that all have the same steps.
    """
    with pauses.spent("saving"):
        if not all(run.error for run in runs):
            for index, run in enumerate(runs):
                run.save(step, trainer.adapter_state(state, index))


def _write_reports(runs: Sequence[Run]) -> None:
    """Writes report.html of every run, and of a sweep in its folder."""
    if is_first():
        folders = [run.folder for run in runs]
        for folder in folders:
            write_report([folder], folder / TARGET)
        if runs[0].name:
            write_report(folders, folders[0].parent / TARGET)


def _end_trackers(
    runs: Sequence[Run], kind: type[BaseException] | None, *_: object
) -> None:
    """Asks the trackers of all runs to end, so that they have the same time for it."""
    for run in runs:
        run.report.tracking.end(failed=kind is not None)


def _raise_diverged(runs: Sequence[Run]) -> None:
    lost = [run for run in runs if run.error]
    if not lost:
        return
    if lost[0].error and not lost[0].name:
        raise lost[0].error
    raise DivergedError(
        f"{len(lost)} of {len(runs)} adapters diverged and are not written: "
        f"{listing([run.name for run in lost])}"
    )
