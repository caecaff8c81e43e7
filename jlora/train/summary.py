"""What is printed before the first step of a run, and after the last.

Before: what would be trained, on what, and whether it fits. After: what came out, and the
commands that use it.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import jax
from jax.sharding import Mesh

from jlora.cli.flag_values import as_text
from jlora.cli.jlora_command import start_words
from jlora.config.run_config import RowConfig
from jlora.data.batch.batches import Dataset
from jlora.data.batch.preview import preview_lines, preview_samples
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import counted
from jlora.lora.adapter_tree import Params, format_parameter_count
from jlora.ops.quantize import stored_format
from jlora.parallel.described_devices import DescribedDevice
from jlora.report.ranking import ranked, ranking, table_lines
from jlora.report.run_folder import RunFolder
from jlora.report.samples import show_samples
from jlora.train.memory_estimate import Workload
from jlora.train.pauses import duration
from jlora.train.planning import mesh_in_words
from jlora.train.run import Run


def print_summary(
    trees: Mapping[str, Params],
    data: Dataset,
    held_out: Dataset | None,
    total_steps: int,
    mesh: Mesh,
    work: Workload,
) -> list[str]:
    """Prints parameters, data, steps and devices; returns the lines.

    Args:
        trees: shapes of the base with each adapter, by its name; "" for the only one.
        data: to train on.
        held_out: to evaluate on, or None.
        total_steps: of the run.
        mesh: devices.
        work: what every `auto` stands for.
    """
    lines = [
        (f"{name}: " if name else "") + format_parameter_count(tree)
        for name, tree in trees.items()
    ]
    lines += data.summary + (held_out.summary if held_out else [])
    each = f" for each of {len(trees)} adapters" if len(trees) > 1 else ""
    device = mesh.devices.flat[0]
    every = mesh.size if isinstance(device, DescribedDevice) else jax.device_count()
    compute = work.compute
    count = f"{mesh.size} of {every}" if mesh.size < every else str(mesh.size)
    lines.append(
        f"{total_steps} steps of {data.batch_size} x {data.row_length} tokens{each} on "
        f"{count} {device.device_kind}: {compute.dtype.name}, attention "
        f"{compute.attention}, kernels {compute.kernels}, remat {compute.remat}"
    )
    lines += [f"mesh: {mesh_in_words(mesh)}"] if mesh.size > 1 else []
    lines += [f"kernels xla: {work.hint}"] if work.hint else []
    stored = stored_format(next(iter(trees.values())))
    if stored in compute.code_products:
        lines += [f"{stored} weights: activations are rounded to {stored} for products"]
    elif stored:
        lines += [f"{stored} weights: made {compute.dtype.name} for each product"]
    print("\n".join(lines), flush=True)
    return lines


def print_plan(data: Dataset, tokenizer: Tokenizer, lines: Sequence[str]) -> None:
    """Prints a table of the data, the plan's lines, and samples of the data."""
    print("\n".join([*preview_lines(data), *lines, ""]))
    show_samples(preview_samples(data, tokenizer))


def print_conclusion(
    prompt: str | None,
    runs: Sequence[Run],
    seconds: Mapping[str, float],
    *,
    ended_early: bool,
) -> None:
    """Prints how long a run took, its best evaluation, and the commands that use it.

    Args:
        prompt: to try it with; None: as a chat.
        runs: what was trained together; those of a sweep have a line each.
        seconds: that each kind of work took.
        ended_early: whether it ended before its last planned step.
    """
    parts = [f"{work} {duration(spent)}" for work, spent in seconds.items()]
    print(f"done in {duration(sum(seconds.values()))} ({', '.join(parts)})")
    for run in runs:
        label = f"{run.name}: " if run.name else ""
        past = run.progress
        if ended_early and run.is_out_of_patience:
            waited = counted(past.evaluations_since_best, "evaluation")
            print(f"{label}ended early: no lower eval_loss in {waited}")
        if past.best_eval_loss is not None:
            first = past.initial_eval_loss
            before = "" if first is None else f" ({first:.4f} before the first step)"
            best = f"best eval_loss {past.best_eval_loss:.4f} at step {past.best_step}"
            print(f"{label}{best}{before}")
    if runs[0].name:
        found = ranked([RunFolder.read(run.folder) for run in runs])
        print("\n".join(table_lines(ranking(found))), flush=True)
    else:
        commands = next_commands(runs[0].meta["settings"], prompt)
        for what, words in commands.items():
            print(f"{what + ':':<9} {shlex.join(words)}", flush=True)


def next_commands(
    settings: Mapping[str, Any], prompt: str | None
) -> dict[str, list[str]]:
    """Returns the words of the commands that try, evaluate and export a finished run."""
    model, run, data = settings["model"], settings["output_dir"], settings["data"]
    trained = ["--model", model, "--adapter", run]
    ask = ["--chat"] if prompt is None else ["--prompt", prompt]
    if prompt and prompt.startswith("-"):  # would be taken for a flag
        ask = [f"--prompt={prompt}"]
    rows = [
        f"--data.{item.name}={as_text(data[item.name])}"
        for item in fields(RowConfig)
        if data[item.name] != item.default
    ]
    held_out = as_text(data["eval"] or "HELD_OUT.jsonl")
    return {
        "try": [*start_words("generate"), *trained, *ask],
        "evaluate": [*start_words("evaluate"), *trained, "--data", held_out, *rows],
        "export": [*start_words("export"), run, f"{run.rstrip('/')}-merged"],
    }
