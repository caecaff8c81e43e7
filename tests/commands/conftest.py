"""The model, run and base that the tests of commands share; none of them changes these."""

import contextlib
from pathlib import Path

import pytest
from helpers.commands import make_workdir, succeed, train_flags


@pytest.fixture(scope="session")
def workdir(tmp_path_factory) -> Path:
    """The folder where every relative path of these tests begins."""
    return make_workdir(tmp_path_factory.mktemp("commands"))


@pytest.fixture
def in_workdir(workdir, monkeypatch):
    monkeypatch.chdir(workdir)


@pytest.fixture(scope="session")
def run(workdir) -> Path:
    """A finished run, its printed lines in the file `out`."""
    flags = train_flags("run", "--data.eval", "eval.jsonl", "--train.eval_every", 20)
    with contextlib.chdir(workdir):
        (workdir / "run").mkdir()
        (workdir / "run" / "out").write_text(succeed("train", *flags))
    return workdir / "run"


@pytest.fixture(scope="session")
def base(workdir) -> Path:
    succeed("convert.from_hf", workdir / "hf", workdir / "base")
    return workdir / "base"
