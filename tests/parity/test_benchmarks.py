"""The benchmarks that compare with PEFT run on a toy size."""

import json
import subprocess
import sys

from helpers import ROOT


def run_script(name: str, *arguments: str) -> list[str]:
    """Returns the lines that the benchmark prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_cpu_peer_measures_every_variant() -> None:
    lines = run_script(
        "cpu_peer", "--steps", "1", "--layers", "1", "--vocab_size", "512"
    )
    found = {line["what"]: line for line in map(json.loads, lines)}
    assert len(found) == 4
    assert all(line["cpu_s"] > 0 for line in found.values())


def test_packing_peer_trains_on_packed_rows() -> None:
    (line,) = run_script("packing_peer", "--tiny")
    assert json.loads(line)["tokens_per_second"] > 0


def test_loss_curve_imports_and_explains_its_flags() -> None:
    # A run takes minutes: PEFT's bfloat16 is slow on a CPU.
    assert any("--steps" in line for line in run_script("loss_curve", "--help"))
