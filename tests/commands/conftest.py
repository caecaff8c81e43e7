"""The model, run and base that the tests of commands share; none of them changes these."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from helpers.commands import make_workdir, succeed, train_flags
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="session")
def compile_settings(tmp_path_factory) -> dict[str, object]:
    return {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }


@contextlib.contextmanager
def compiled_once(settings: dict[str, object]) -> Iterator[None]:
    """Keeps every program that XLA compiles, for whoever compiles the same one."""
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def compiled(compile_settings) -> Iterator[dict[str, str]]:
    """Shares compiled programs; yields the environment that does so in other processes."""
    with compiled_once(compile_settings):
        yield {name.upper(): str(value) for name, value in compile_settings.items()}


@pytest.fixture(scope="session")
def workdir(tmp_path_factory) -> Path:
    """The folder where every relative path of these tests begins."""
    return make_workdir(tmp_path_factory.mktemp("commands"))


@pytest.fixture
def in_workdir(workdir, monkeypatch):
    monkeypatch.chdir(workdir)


@pytest.fixture(scope="session")
def run(workdir, compile_settings) -> Path:
    """A finished run, its printed lines in the file `out`."""
    flags = train_flags("run", "--data.eval", "eval.jsonl", "--train.eval_every", 20)
    with contextlib.chdir(workdir), compiled_once(compile_settings):
        (workdir / "run").mkdir()
        (workdir / "run" / "out").write_text(succeed("train", *flags))
    return workdir / "run"


@pytest.fixture(scope="session")
def base(workdir) -> Path:
    succeed("convert.from_hf", workdir / "hf", workdir / "base")
    return workdir / "base"
