"""Runs every test on eight simulated CPU devices; holds the fixtures that files share."""

import os
import signal
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A shell starts jobs in the background with Ctrl-C ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Read once, when JAX starts its backend: before any test imports the library.
flags = ["--xla_force_host_platform_device_count=8"]
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Most programs of the tests run once or twice, so optimizing their machine code
    # takes longer than it saves: more than half of the tests' time.
    flags += ["--xla_backend_optimization_level=0"]
    if version("jaxlib") < "0.11":  # later ones do not know the flag
        flags += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
# Token caches of the tests, also in processes that they start, and compiled programs
# die with the machine's temporary files; a folder named beforehand keeps programs.
os.environ["JLORA_CACHE"] = tempfile.mkdtemp(prefix="jlora-tests-")
# JAX writes its files in place, so each worker has a folder of its own: none reads half
# a program of another.
programs = Path(
    os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.environ["JLORA_CACHE"],
    os.environ.get("PYTEST_XDIST_WORKER", "programs"),
)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(programs)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A path where nothing is yet."""
    return tmp_path / "out"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A hub on this machine, in an empty folder where paths begin."""
    from helpers.hub_server import asked_hub  # imports the library

    monkeypatch.chdir(tmp_path)
    with asked_hub(monkeypatch, tmp_path / "caches") as server:
        yield server
