"""Commands run in this process, and the small model with data that they work on."""

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest

from helpers import ROOT
from helpers.data_cases import chat, make_files, write_rows
from helpers.tiny import CONFIG, tensors, write_hf
from jlora.cli.command import run_command

HF_CONFIG = {
    **CONFIG,
    "hidden_size": 32,
    "intermediate_size": 48,
    "vocab_size": 400,
    "max_position_embeddings": 128,
    "bos_token_id": 3,
    "eos_token_id": 4,
}
STEPS = 40


class Done(NamedTuple):
    status: int
    out: str
    err: str


def call(name: str, *flags: object) -> Done:
    """Runs a command in this process, as `python NAME FLAGS` would."""
    module = importlib.import_module(name)
    out, err = io.StringIO(), io.StringIO()
    words = mock.patch.object(sys, "argv", [f"{name}.py"])
    with words, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run_command(module.main, module.Arguments, argv=list(map(str, flags)))
    return Done(status, out.getvalue(), err.getvalue())


def succeed(name: str, *flags: object) -> str:
    """Runs a command that must end with 0 and no message; returns what it prints."""
    done = call(name, *flags)
    assert (done.status, done.err) == (0, "")
    return done.out


def generated(*flags: object) -> str:
    """What generate prints, after a closing line of figures was checked."""
    done = call("generate", *flags)
    figures = r"[\d,]+ tokens?(, [\d.]+ tokens/s)?, the first after [\d.]+ s\n"
    assert re.fullmatch(f"({figures})+", done.err), done.err
    assert done.status == 0
    return done.out


def start_python(*words: object, **environment: str) -> subprocess.Popen[str]:
    """Starts Python on a script of the checkout, or on code after "-c"."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def finish(process: subprocess.Popen[str]) -> Done:
    out, err = process.communicate(timeout=120)
    return Done(process.returncode, out, err)


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def losses(run: Path) -> list[float]:
    """The training loss of every logged step."""
    return [line["loss"] for line in metrics(run) if "loss" in line]


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def evaluated_loss(*flags: object) -> float:
    flags = ("--data", "eval.jsonl", "--data.seq_len", 64, *flags)
    return float(succeed("evaluate", *flags).split()[1])


def make_model(folder: Path, template: str = "chatml", **changes: Any) -> Path:
    """Writes a model with tokenizer and chat template; `changes` are of its config."""
    config = HF_CONFIG | changes
    arrays = {
        key: array * 0.1 if array.ndim == 2 else np.ones_like(array)
        for key, array in tensors(config).items()
    }
    write_hf(folder, config, arrays)
    for name, data in make_files(template).items():
        (folder / name).write_bytes(data)
    return folder


def make_workdir(folder: Path) -> Path:
    """Fills a folder with a model `hf`, a training set, held-out data and a chat."""
    make_model(folder / "hf")
    for name, letters in (("train", "abcdefgh"), ("eval", "ace")):
        rows = [
            {"prompt": f"What is {x}?", "completion": f" It is {x}."} for x in letters
        ]
        write_rows(folder / f"{name}.jsonl", rows)
    write_rows(folder / "chat.jsonl", [chat("What is the sum?", "The sum is five.")])
    return folder


def train_flags(run: object, *more: object) -> list[object]:
    """The flags that every test of training starts from."""
    return [
        *("--model", "hf", "--output_dir", run, "--data.train", "train.jsonl"),
        *("--data.seq_len", 64, "--lora.target_modules", "all-linear"),
        *("--optim.learning_rate", 0.02, "--train.max_steps", STEPS),
        *("--report.samples", 0),
        *more,
    ]
