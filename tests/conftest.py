"""Runs every test on eight simulated CPU devices; holds the fixtures that files share."""

import os
import tempfile
from pathlib import Path

import pytest

# Read once, when JAX starts its backend: before any test imports the library.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Token caches of the tests, also in processes that they start, and compiled programs
# die with the machine's temporary files; a folder named beforehand keeps programs.
os.environ["JLORA_CACHE"] = tempfile.mkdtemp(prefix="jlora-tests-")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.environ["JLORA_CACHE"] + "/compiled"
)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A path where nothing is yet."""
    return tmp_path / "out"
