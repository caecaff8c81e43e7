"""One adapter in training: its data, its run folder, its log and its checkpoints."""

import platform
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from jax.sharding import Mesh

from jlora.cli.jlora_command import start_words
from jlora.config.lora_config import LoraConfig
from jlora.config.run_config import TrainConfig
from jlora.data.batch.batches import Dataset
from jlora.errors import (
    CorruptError,
    DivergedError,
    UsageError,
    about_file,
    warn,
)
from jlora.lora.adapter_tree import Params, is_adapter, join, map_leaves
from jlora.parallel.processes import is_first, to_host
from jlora.report.run_folder import write_facts
from jlora.report.run_report import Report
from jlora.train.checkpoint import adapter_of_step, save_checkpoint
from jlora.train.evaluation import Evaluator
from jlora.train.optimizer import make_schedule
from jlora.train.progress import Progress
from jlora.train.resuming import DIGESTS
from jlora.train.step import TrainState
from jlora.train.step_log import StepLog
from jlora.train.trainer import TrainedAdapter


@dataclass
class Run:
    """One adapter, alone or beside others in a sweep, and the run folder it is trained in.

    Attributes:
        name: in a sweep; empty for a single run.
        folder: run folder.
        lora: settings of the adapter, for its export.
        adapter: what is trained, at the step where training begins.
        meta: written into every checkpoint; see `jlora.train.resuming.resume_all`.
        data: what it is trained on.
        held_out: what it is evaluated on, or None.
        flops_per_token: of the model with this adapter.
        devices: that compute it.
        facts: what the report tells of its start; see `jlora.report.run_folder`.
        progress: what it remembers besides its state.
        error: why this run has ended before the others, or None.
    """

    name: str
    folder: Path
    lora: LoraConfig
    adapter: TrainedAdapter
    meta: dict[str, Any]
    data: Dataset
    held_out: Dataset | None
    flops_per_token: float
    devices: int
    facts: dict[str, Any] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    error: DivergedError | None = None
    report: Report = field(init=False)
    _log: StepLog = field(init=False)
    _config: TrainConfig = field(init=False)

    @classmethod
    def create(
        cls,
        settings: Any,
        params: Params,
        lora: LoraConfig,
        splits: tuple[Dataset, Dataset | None],
        mesh: Mesh,
        *,
        name: str,
        shared: dict[str, Any],
        together: list[str],
        flops_per_token: float,
        facts: dict[str, Any],
    ) -> "Run":
        """Returns a run at step 0.

        Args:
            settings: arguments of train.py for this run.
            params: the base with the adapter to train.
            lora: settings of that adapter.
            splits: data to train on, and held-out data or None.
            mesh: devices.
            name: in a sweep; empty for a single run.
            shared: of the model; what a resumed run must have in common with the one it
                continues, besides its data, adapter settings and seed.
            together: names of all runs that are trained together.
            flops_per_token: of the model with this adapter.
            facts: lines of the summary, and samples of the data.
        """
        data, held_out = splits
        own = {
            "jlora": _jlora_version(),
            "data": data.fingerprint,
            "lora": asdict(lora),
            "seed": settings.seed,
            "optim.optimizer": settings.optim.optimizer,
            "batch_size": data.batch_size,
            "data.packing": settings.data.packing,
            "data.seq_len": data.row_length,
        }
        if data.revisions:
            own["data.revisions"] = data.revisions
        return cls(
            name=name,
            folder=Path(settings.output_dir),
            lora=lora,
            adapter=TrainedAdapter.create(
                params,
                settings.optim,
                mesh,
                seed=settings.seed,
                lora_dropout=lora.lora_dropout,
            ),
            meta={
                "settings": {**asdict(settings), "lora": asdict(lora)},
                "identity": {**shared, **own},
                "versions": {n: version(n) for n in ("jax", "flax", "optax")},
                "sweep": together,
            },
            data=data,
            held_out=held_out,
            flops_per_token=flops_per_token,
            devices=mesh.size,
            facts=facts,
        )

    @contextmanager
    def open(
        self,
        config: TrainConfig,
        steps_done: int,
        total_steps: int,
        runs: Sequence["Run"],
    ) -> Iterator[None]:
        """Writes config.yaml and facts.json, and keeps the log open.

        Args:
            config: how often to log, and how many checkpoints to keep.
            steps_done: by the run that this one continues.
            total_steps: where training ends.
            runs: all that are trained together; they share the first one's display.
        """
        write_settings(self.folder, self.meta["settings"])
        if is_first():
            write_facts(self.folder, self._all_facts())
        self.report = Report(
            self.folder,
            total_steps=total_steps,
            start_step=steps_done,
            name=self.name,
            beside=None if runs[0] is self else runs[0].report,
        )
        if is_first():
            self.report.tracking.start(
                self.meta["settings"],
                start_step=steps_done,
                in_sweep=bool(self.name),
                say=self.report.say,
            )
        if steps_done < total_steps and (self.folder / "adapter").is_dir():
            self.report.say(
                f"{self.folder / 'adapter'} stays as it is until the end; --adapter "
                f"{self.folder} takes the newest checkpoint"
            )
        self._config = config
        self._log = StepLog(
            self.report,
            self.progress,
            make_schedule(self.adapter.optim, total_steps),
            flops_per_token=self.flops_per_token,
            steps_per_epoch=self.data.steps_per_epoch,
            log_every=config.log_every,
            total_steps=total_steps,
            devices=self.devices,
            index=next(i for i, run in enumerate(runs) if run is self),
        )
        with self.report:
            yield

    def _all_facts(self) -> dict[str, Any]:
        """Returns `facts` with versions, digests and the command that repeats the run."""
        again = ["--config", str(self.folder / "config.yaml")]
        again += ["--output_dir", f"{self.folder}-again", "--resume", "auto"]
        system = {"python": platform.python_version(), "system": platform.platform()}
        return {
            **self.facts,
            "versions": {"jlora": _jlora_version(), **self.meta["versions"], **system},
            "identity": {
                name: self.meta["identity"][name]
                for name in DIGESTS
                if self.meta["identity"].get(name)
            },
            "command": shlex.join([*start_words("train"), *again]),
        }

    def log(self, step: int, metrics: dict[str, Any], waited_s: float) -> None:
        """Logs the step before and keeps this one; see `StepLog.add`."""
        self.flush()
        if not self.error:
            self._log.add(step, metrics, waited_s)

    def flush(self, *, is_last: bool = False) -> None:
        """Logs the pending step, `is_last`: in any case; sets `error` if it diverged."""
        if self.error:
            return
        try:
            (self._log.end if is_last else self._log.flush)()
        except DivergedError as error:
            self.error = error
            if self.name:  # the others go on
                self.report.say(str(error))

    def restart_clock(self) -> None:
        """Leaves out of the next step's time what came before it."""
        self._log.restart_clock()

    @property
    def training_s(self) -> float:
        """How long the steps took that this process trained."""
        return self._log.training_s

    def evaluate(self, evaluator: Evaluator, step: int, params: Params) -> None:
        """Logs the loss on the held-out data, which the run must have."""
        assert self.held_out is not None
        if self.error:
            return
        loss = evaluator.loss(params, self.held_out)
        is_best = self.progress.add_evaluation(step, loss)
        self.report.log_evaluation(step, loss, is_best=is_best)

    def save(self, step: int, state: TrainState) -> None:
        """Writes a checkpoint."""
        folder = self.folder / "checkpoints"
        meta = {**self.meta, "progress": asdict(self.progress)}
        also = self.progress.best_step if self._config.keep_best else None
        save_checkpoint(folder, step, state, meta, keep=self._config.keep, also=also)

    @property
    def has_new_best(self) -> bool:
        """Whether the latest evaluation is the best, and its step is to be kept."""
        is_best = self.progress.best_step and not self.progress.evaluations_since_best
        return bool(self._config.keep_best and is_best and not self.error)

    @property
    def is_out_of_patience(self) -> bool:
        """Whether so many evaluations were not the best that training is to end."""
        patience = self._config.early_stopping_patience
        return 0 < patience <= self.progress.evaluations_since_best

    def trained_params(self, state: TrainState) -> tuple[Params, int]:
        """Returns the whole tree and its step: the last, or the best if that is kept.

        The adapter's leaves are NumPy arrays. All processes take part: one of them may
        hold only a part of a leaf.
        """
        trainable, step = state.trainable, int(state.step)
        best = self.progress.best_step if self._config.keep_best else None
        if best is not None and best != step:
            try:
                trainable = adapter_of_step(self.folder / "checkpoints", best)[1]
                step = best
            except (CorruptError, UsageError) as error:
                warn(f"step {step} is exported instead of the best: {error}")
        tree = map_leaves(
            lambda path, leaf: to_host(leaf) if is_adapter(path[-1]) else leaf,
            join(trainable, self.adapter.frozen),
        )
        return tree, step


def _jlora_version() -> str:
    try:
        return version("jlora")
    except PackageNotFoundError:  # a checkout that is used without being installed
        return "unknown"


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Writes config.yaml, which --config takes back."""
    if is_first():
        text = yaml.safe_dump(settings, sort_keys=False)
        with about_file(folder / "config.yaml"):
            (folder / "config.yaml").write_text(text)
