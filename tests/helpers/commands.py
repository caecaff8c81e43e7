"""Commands run in this process, and the fixtures of a small model with data."""

import contextlib
import importlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

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
PER_STEP = {
    *("step", "epoch", "loss", "learning_rate", "grad_norm"),
    *("tokens", "supervised_tokens", "tokens_per_second"),
    *("step_time_s", "data_wait_s", "mfu", "peak_memory_bytes"),
}


class Done(NamedTuple):
    status: int
    out: str
    err: str


def call(name: str, *words: object) -> Done:
    """Runs a command in this process, as `python NAME WORDS` would."""
    module = importlib.import_module(name)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run_command(
            module.main,
            module.Arguments,
            argv=list(map(str, words)),
        )
    return Done(status, out.getvalue(), err.getvalue())


def succeed(name: str, *words: object) -> str:
    done = call(name, *words)
    assert (done.status, done.err) == (0, "")
    return done.out


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Runs share what XLA compiled; the environment does it for other processes."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield {name.upper(): str(value) for name, value in settings.items()}
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model `hf` and data, where every relative path begins."""
    folder = tmp_path_factory.mktemp("commands")
    arrays = {
        key: array * 0.1 if array.ndim == 2 else np.ones_like(array)
        for key, array in tensors(HF_CONFIG).items()
    }
    write_hf(folder / "hf", HF_CONFIG, arrays)
    for name, data in make_files().items():
        (folder / "hf" / name).write_bytes(data)
    for name, letters in (("train", "abcdefgh"), ("eval", "ace")):
        rows = [
            {"prompt": f"What is {x}?", "completion": f" It is {x}."} for x in letters
        ]
        write_rows(folder / f"{name}.jsonl", rows)
    write_rows(folder / "chat.jsonl", [chat("What is the sum?", "The sum is five.")])
    return folder


@pytest.fixture
def inside(place, monkeypatch):
    monkeypatch.chdir(place)


def training(run: object, *more: object) -> list[object]:
    """The words of a run that every test of training starts from."""
    return [
        *("--model", "hf", "--output_dir", run, "--data.train", "train.jsonl"),
        *("--data.seq_len", 64, "--lora.target_modules", "all-linear"),
        *("--optim.learning_rate", 0.02, "--train.max_steps", STEPS),
        *more,
    ]


@pytest.fixture(scope="module")
def run(place) -> Path:
    """A finished run, its printed lines in the file `out`."""
    with contextlib.chdir(place):
        words = training("run", "--data.eval", "eval.jsonl", "--train.eval_every", 20)
        (place / "run").mkdir()
        (place / "run" / "out").write_text(succeed("train", *words))
    return place / "run"


@pytest.fixture(scope="module")
def base(place) -> Path:
    succeed("convert.from_hf", place / "hf", place / "base")
    return place / "base"
