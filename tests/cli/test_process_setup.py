import os
import platform
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from helpers import ROOT

from jlora.cli.process_setup import take_gpu_memory

COMPILES = """
import jax
from jlora.cli.process_setup import keep_compiled

hits = []
jax.monitoring.register_event_listener(lambda event: hits.append("cache_hits" in event))
keep_compiled()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.jit(lambda x: x * 3 + 1)(2.0), sum(hits))
"""


def run(home: Path, **more: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "XDG_CACHE_HOME"}
    environment["JAX_COMPILATION_CACHE_DIR"] = ""  # not that of the tests
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPILES],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": str(ROOT), "HOME": str(home), **more},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}),
        *[
            ({name: "0.5"}, {name: "0.5"})
            for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
        ],
    ],
)
def test_jax_gets_most_of_a_gpu_unless_the_user_says_otherwise(given, expected):
    with mock.patch.dict(os.environ, given, clear=True):
        take_gpu_memory()
        assert dict(os.environ) == expected


def test_a_second_start_finds_what_the_first_compiled(tmp_path) -> None:
    assert run(tmp_path) == "7.0 0"
    kept = tmp_path / ".cache" / "jlora" / "compiled"
    assert len(list(kept.glob("*-cache"))) == 1
    assert kept.stat().st_mode & 0o077 == 0
    assert run(tmp_path) == "7.0 1"


def test_a_cache_folder_of_the_users_choice_is_taken(tmp_path) -> None:
    run(tmp_path, XDG_CACHE_HOME=str(tmp_path / "xdg"))
    run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "jax"))
    kept = sorted(tmp_path.rglob("*-cache"))
    assert [path.relative_to(tmp_path).parts[0] for path in kept] == ["jax", "xdg"]


@pytest.mark.parametrize("fault", ["a file", "writable by others"])
def test_without_a_folder_to_trust_nothing_is_kept(tmp_path, fault: str) -> None:
    folder = tmp_path / ".cache" / "jlora" / "compiled"
    if fault == "a file":
        (tmp_path / ".cache").write_text("")
    else:
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    assert run(tmp_path) == "7.0 0"
    assert not list(tmp_path.rglob("*-cache"))


COMPUTES = """
import resource
from jlora.cli.process_setup import keep_freed_memory
keep_freed_memory()
import jax, jax.numpy as jnp
import numpy as np

compute = jax.jit(lambda x: (x @ x.T) @ x)  # 64 MiB between the products
x = jax.block_until_ready(jnp.ones((4096, 8)))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(compute(x))
    np.full(1 << 27, 1, np.int8)  # at the heap's end: longer than what is free before it
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(min([faults() for _ in range(6)]))  # the first ones fill the heap
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_a_second_call_maps_no_memory_anew() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPUTES],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1000  # of 49,152 pages
