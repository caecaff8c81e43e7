"""The model card of an export: what it is made of, how it was trained, how well it did."""

from pathlib import Path
from typing import Any

import yaml

from jlora.config.lora_config import LoraConfig
from jlora.data.read.hub_data import is_data_id
from jlora.hub import is_hub_id
from jlora.report.run_folder import RunFolder

_KINDS = {
    "adapter": ("a LoRA adapter for", "adapter", "peft"),
    "merged": ("a fine-tune of", "finetune", "transformers"),
    "gguf": ("a fine-tune, as GGUF, of", "quantized", "gguf"),
}
_SETTINGS = (
    *("optim.learning_rate", "optim.lr_schedule", "train.batch_size", "data.seq_len"),
    *("data.packing", "compute.base_dtype", "compute.dtype", "seed"),
)


def model_card(
    name: str,
    base: str,
    license: str | None,
    form: str,
    *,
    lora: LoraConfig,
    run: RunFolder | None,
) -> str:
    """Returns the README.md of a repository on the hub.

    Args:
        name: of the repository.
        base: the base's hub id, or a name.
        license: of the base; None if it is not known.
        form: merged, adapter or gguf.
        lora: settings of the adapter.
        run: the training, if it is known.
    """
    what, relation, library = _KINDS[form]
    head: dict[str, Any] = {"library_name": library, "tags": ["jlora", "lora"]}
    if is_hub_id(base):
        head |= {"base_model": base, "base_model_relation": relation}
    if license is not None:
        head["license"] = license
    terms = (
        f"The base's licence is {license}; it holds for this model, too."
        if license
        else "The base's licence holds for this model, too; it is not known here."
    )
    lines = [
        f"# {name.partition('/')[2]}",
        f"{name} is {what} {base}, trained with jlora.",
        terms,
        *_table("Adapter", _adapter_rows(lora)),
        *(_run_lines(run) if run else []),
    ]
    front = yaml.safe_dump(head, sort_keys=True, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n\n".join(lines) + "\n"


def _adapter_rows(lora: LoraConfig) -> dict[str, Any]:
    targets = lora.target_modules
    named = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
    rows = {"r": lora.r, "lora_alpha": lora.lora_alpha, "target_modules": named}
    extras = {"use_rslora": lora.use_rslora, "use_dora": lora.use_dora}
    return rows | {key: value for key, value in extras.items() if value}


def _run_lines(run: RunFolder) -> list[str]:
    data = run.settings.get("data") or {}
    given = data.get("train")
    paths = given if isinstance(given, list | dict) else [given] if given else []
    rows = {"data": ", ".join(_data_name(str(path)) for path in paths)}
    for key in _SETTINGS:
        group, _, field = key.rpartition(".")
        place = run.settings.get(group) or {} if group else run.settings
        if place.get(field) is not None:
            rows[key] = place[field]
    return [
        *_table("Training", rows),
        *_table("Result", _result_rows(run)),
    ]


def _data_name(given: str) -> str:
    """Returns a data set of the hub as it was given, and only the name of a file or folder.

    Paths belong to the machine.
    """
    return given if is_data_id(given) else Path(given).absolute().name


def _result_rows(run: RunFolder) -> dict[str, str]:
    losses, held_out = run.points("loss"), run.points("eval_loss")
    rows = {}
    if losses:
        rows["steps"] = f"{losses[-1][0]:,}"
        rows["training loss"] = f"{losses[0][1]:.4f} to {losses[-1][1]:.4f}"
    if held_out:
        step, best = min(held_out, key=lambda point: point[1])
        rows["held-out loss"] = f"{held_out[0][1]:.4f} to {held_out[-1][1]:.4f}"
        rows["lowest held-out loss"] = f"{best:.4f} at step {step:,}"
    return rows


def _table(title: str, rows: dict[str, Any]) -> list[str]:
    """Returns a heading and a table in Markdown."""
    if not rows:
        return []
    cells = [f"| {key} | {_cell(value)} |" for key, value in rows.items()]
    return [f"## {title}", "\n".join(["| | |", "|---|---|", *cells])]


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
