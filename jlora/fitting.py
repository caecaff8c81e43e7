"""Trains from Python: `jlora.fit`, which is `jlora train` on records in memory."""

import dataclasses
import hashlib
import json
import os
import signal
import threading
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from jlora.cli.arguments import with_changes
from jlora.cli.flags import flags_of
from jlora.cli.jlora_command import load_command
from jlora.config.lora_config import LoraConfig
from jlora.errors import StopRequested, UsageError, about_file
from jlora.loading import Base, Loaded, model_for_text, open_adapter
from jlora.lora.adapter_tree import is_adapter, modules
from jlora.report.metrics_file import read_metrics
from jlora.train.checkpoint import saved_steps
from jlora.train.resuming import check_run
from jlora.train.stopping import StopRequest, stop_requests

_WHERE = "jlora.fit"
# What the other parameters say, or what is for the command alone.
_NOT_SETTINGS = ("model", "output_dir", "sweep", "plan", "device")
# Dicts, paths, or {path: weight}; anything else is one UsageError, not a type checker's.
Records = Iterable[Any] | Path


class Fitted(Loaded):
    """(model, params, tokenizer) of a base with the adapter that was trained on it.

    Attributes:
        lora: settings of the adapter, for `jlora.save_adapter`.
        metrics: the lines of metrics.jsonl, a dict for every logged step or evaluation.
        folder: of the run; its adapter/ is a PEFT adapter when the run is finished.
        is_finished: whether it came to its end. If not, the same call goes on.
    """

    lora: LoraConfig
    metrics: list[dict[str, Any]]
    folder: Path
    is_finished: bool

    def __repr__(self) -> str:
        state = "finished" if self.is_finished else "stopped"
        step = max((line["step"] for line in self.metrics), default=0)
        return f"<Fitted in {self.folder}: {state} at step {step}>"


def fit(
    model: str | Path | Loaded,
    records: Records,
    output_dir: str | Path,
    *,
    eval_records: Records | None = None,
    **settings: Any,
) -> Fitted:
    """Trains an adapter as `jlora train` does, and returns it with its base.

        fitted = jlora.fit("base", records, "run", r=16, learning_rate=1e-4, max_steps=100)
        jlora.generate(*fitted, "What is the capital of France?")

    Interrupting the kernel, or Ctrl-C, saves after the step that runs and returns; the same
    call then goes on, and so does a second call after the end if it asks for more steps.

    Args:
        model: HF folder, hub id, .gguf file or converted base; or what `jlora.load`
            returned without an adapter, whose weights are used as they are.
        records: dicts of any format that a file may have, such as {"messages": [...]} or
            {"prompt": "...", "completion": "..."}; they are kept in the run folder. Or
            what data.train takes: a path, a list of paths, {path: passes per epoch}.
        output_dir: run folder.
        eval_records: held-out records, likewise.
        **settings: keys of `jlora train`, with or without their group: learning_rate=1e-4,
            optim={"learning_rate": 1e-4}, lora=jlora.LoraConfig(r=16), seed=1.

    Raises:
        UsageError: an unknown key or a value that is not allowed, or a folder that cannot
            be used.
        UnsupportedError, CorruptError: as `jlora.load`, and records that cannot be used.
        ResourceError, DivergedError: no memory or disk; numbers that are not finite.
        StopRequested: stopped before the first step, or by SIGTERM.
    """
    _check_kind(
        "model", model, str | Path | Loaded, "a path or what jlora.load returned"
    )
    _check_kind("output_dir", output_dir, str | Path, "a path")
    command = load_command("train")
    base = _base_of(model) if isinstance(model, Loaded) else None
    path = base.path if base else str(model)
    args = command.Arguments(model=path, output_dir=str(output_dir))
    args = _with_settings(args, settings, base)
    folder = Path(output_dir)
    check_run(folder, args.resume)
    files: dict[Path, bytes] = {}
    data = {"train": _source("records", records, folder / "data" / "train", files)}
    if eval_records is not None:
        eval_file = folder / "data" / "eval"
        data["eval"] = _source("eval_records", eval_records, eval_file, files)
    args = with_changes(args, {"data": data}, _WHERE)
    base = base or Base.open(path, args.compute.base_dtype)
    while files:  # not kept in memory during the training
        _write(*files.popitem())
    is_finished = True
    with _stop_requests() as stop:
        try:
            command.train(args, stop, base)
        except StopRequested as error:
            if stop.number == signal.SIGTERM or not saved_steps(folder / "checkpoints"):
                raise
            is_finished = False
            print(f"{error.label}: {error}", flush=True)
    return _fitted(base, args, folder, is_finished=is_finished)


def _check_kind(name: str, value: Any, kind: Any, expected: str) -> None:
    if not isinstance(value, kind):
        raise UsageError(
            f"{_WHERE}: {name} is of type {type(value).__name__}; expected {expected}"
        )


def _base_of(loaded: Loaded) -> Base:
    adapted = any(
        is_adapter(leaf) for x in modules(loaded.params).values() for leaf in x
    )
    if adapted:
        raise UsageError(
            f"{_WHERE}: the model has an adapter already; give its base, and the adapter as "
            "init_adapter to train it further"
        )
    return loaded.base


def _with_settings(args: Any, settings: dict[str, Any], base: Base | None) -> Any:
    """Returns the arguments with the settings, each by its key or the last part of it."""
    flags = flags_of(type(args))
    groups = {key.partition(".")[0] for key in flags if "." in key}
    key_of = {key.rpartition(".")[2]: key for key in flags if "." in key}
    changes: dict[str, Any] = {}
    for name, value in settings.items():
        if name in _NOT_SETTINGS:
            raise UsageError(f"{_WHERE}: {name} is not a setting here; see jlora train")
        if name in groups and isinstance(value, type(getattr(args, name))):
            args = dataclasses.replace(args, **{name: value})
        else:
            is_key = name in groups or name in flags
            changes[name if is_key else key_of.get(name, name)] = _plain(value)
    args = with_changes(args, changes, _WHERE)
    if base is not None:
        if args.compute.base_dtype not in ("keep", base.dtype):
            raise UsageError(
                f"{_WHERE}: base_dtype={args.compute.base_dtype}, and the model is loaded as "
                f"{base.dtype}; leave it out, or load it with this base_dtype"
            )
        args = with_changes(args, {"compute.base_dtype": base.dtype}, _WHERE)
    return args


def _plain(value: Any) -> Any:
    """Returns a value as a YAML file would have it."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # a scalar or an array of NumPy or JAX
        return value.tolist()
    if isinstance(value, Mapping):
        return {_plain(key): _plain(each) for key, each in value.items()}
    return [*map(_plain, value)] if isinstance(value, list | tuple | set) else value


def _source(name: str, records: Records, path: Path, files: dict[Path, bytes]) -> Any:
    """Returns paths as they are; records as the file that is to hold them.

    The file's name has a digest of what it holds, so that no run loses its data.

    Args:
        name: of the parameter.
        records: its value.
        path: of the file, without digest and suffix.
        files: takes the file and what is to be written to it.
    """
    if isinstance(records, str | Path | Mapping):
        return _plain(records)
    _check_kind(name, records, Iterable, "dicts, a path, or {path: passes per epoch}")
    items = list(records)
    if items and all(isinstance(item, str | Path) for item in items):
        return [str(item) for item in items]
    if not items:
        raise UsageError(f"{_WHERE}: {name} is empty")
    lines = b"".join(_line(name, item, i) for i, item in enumerate(items))
    digest = hashlib.sha256(lines).hexdigest()[:16]
    file = path.with_name(f"{path.name}-{digest}.jsonl")
    files[file] = lines
    return str(file)


def _write(file: Path, lines: bytes) -> None:
    with about_file(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(lines)
        temporary.replace(file)


def _line(name: str, item: Any, index: int) -> bytes:
    if not isinstance(item, Mapping):
        raise UsageError(f"{_WHERE}: {name}[{index}] is {item!r:.80}; expected a dict")
    try:
        return json.dumps(dict(item), allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise UsageError(f"{_WHERE}: {name}[{index}] is no JSON: {error}") from error


def _stop_requests() -> AbstractContextManager[StopRequest]:
    """Returns what the signals set; Python gives those to the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        return nullcontext(StopRequest())
    return stop_requests(in_notebook=True)


def _fitted(base: Base, args: Any, folder: Path, *, is_finished: bool) -> Fitted:
    adapter = open_adapter(folder)
    params, config = base.adapted(adapter)
    fitted = Fitted.of(model_for_text(config, args.compute.dtype), params, base)
    fitted.lora, fitted.folder, fitted.is_finished = adapter.config, folder, is_finished
    fitted.metrics = read_metrics(folder / "metrics.jsonl")
    return fitted
