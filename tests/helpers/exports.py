"""Exports of the golden adapters, by the commands' own code."""

import json
from pathlib import Path
from typing import Any

import safetensors.numpy

from convert import to_hf, to_peft
from helpers.adapters import GOLDEN, Case, tensors
from jlora.formats.peft.adapter import Adapter
from jlora.formats.peft.adapter_reader import read_adapter

HF_GOLDEN = GOLDEN.parent / "hf"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def export(
    case: Case, out: Path, *, dtype: Any = "keep", check: Any = False, **more: Any
) -> Path:
    arguments = to_hf.Arguments(
        out=str(out),
        model=str(case.base),
        adapter=str(case.folder),
        dtype=dtype,
        verify=check,
        **more,
    )
    to_hf.main(arguments)
    return out


def peft_for(reader: Any, folder: Path, out: Path) -> Adapter:
    """Writes an adapter for a reader, and reads it back."""
    to_peft.main(to_peft.Arguments(out=str(out), adapter=str(folder), for_=reader))
    return read_adapter(out)


def copy_base(folder: Path, name: str, config=None, arrays=None) -> Path:
    """Copies a golden base, with settings merged in and tensors passed through."""
    source = GOLDEN / "_base" / name
    folder.mkdir()
    settings = json.loads((source / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(settings))
    found = tensors(source)
    safetensors.numpy.save_file(
        arrays(found) if arrays else found, folder / "model.safetensors"
    )
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())
