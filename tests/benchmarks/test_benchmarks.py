"""Every benchmark runs on a toy size, in a process of its own as its users start it."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from helpers.commands import make_workdir

BENCHMARKS = ROOT / "benchmarks"
# Scripts that import torch, run by tests/parity; tests of data and conversion run these.
ELSEWHERE = {"cpu_peer", "loss_curve", "packing_peer", "convert_speed", "data_speed"}
ELSEWHERE |= {"memory_table"}  # tests/test_docs.py
HERE = {"step_time", "sweep_time", "packing_gpu", "table", "peers", "compiled_memory"}
HERE |= {"format_quality", "scaling", "generation_speed"}


def run_script(name: str, *arguments: str, devices: int = 1) -> list[str]:
    """Returns the lines that the benchmark prints."""
    # conftest.py gives the tests eight devices; of two flags the later one holds.
    count = f" --xla_force_host_platform_device_count={devices}"
    flags = os.environ["XLA_FLAGS"] + count
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_every_benchmark_is_run_by_a_test() -> None:
    assert {path.stem for path in BENCHMARKS.glob("*.py")} == HERE | ELSEWHERE


def test_compiled_memory_has_a_line_for_each_number_of_layers() -> None:
    lines = run_script(
        *("compiled_memory", "tiny", "--device", "cpu", "--layers", "1", "2"),
        *("--base-dtype", "nf4", "--remat", "full"),
    )
    one, two = map(json.loads, lines)
    assert (one["layers"], two["layers"]) == (1, 2)
    assert (one["remat"], one["kernels"], one["base_dtype"]) == ("full", "xla", "nf4")


def test_step_time_measures_a_step_and_appends_the_line(tmp_path: Path) -> None:
    (line,) = run_script("step_time", "tiny", "--out", str(tmp_path / "lines"))
    assert json.loads(line)["tokens_per_second"] > 0
    assert (tmp_path / "lines").read_text() == line + "\n"


def test_scaling_compares_meshes_and_reports_those_that_fail(tmp_path: Path) -> None:
    meshes = ("data=1", "fsdp=3", "fsdp=2", "data=2,tensor=2", "context=2")
    lines = run_script(
        *("scaling", "tiny", "--meshes", *meshes, "--out", str(tmp_path / "lines")),
        *("--", "--remat", "minimal"),
        devices=4,
    )
    one, failed, *others = map(json.loads, lines)
    assert [line["mesh"] for line in (one, failed, *others)] == list(meshes)
    assert one["of_linear"] == 1
    assert one["predicted"] is None  # of a CPU
    assert failed["exit_status"] == 1
    assert "error" in failed
    for line in others:
        assert line["tokens_per_second_per_device"] > 0
        assert line["loss"] == pytest.approx(one["loss"], abs=0.1)
    # Each layer, though XLA on a CPU removes the barriers, and gathers it only once.
    _, gib, in_loops = others[0]["collectives"]["all-gather"]
    assert gib > 2 * one["layer_gib"]
    assert in_loops == 0
    (skipped,) = run_script(
        *("scaling", "tiny", "--meshes", "data=1", "--limit-s", "0"),
        *("--out", str(tmp_path / "lines")),
    )
    assert "no time left" in json.loads(skipped)["error"]


def test_generation_speed_has_a_line_for_each_number_of_rows() -> None:
    lines = run_script(
        *("generation_speed", "tiny", "--rows", "1", "2", "--prompt", "5"),
        *("--tokens", "9", "--base-dtype", "int8", "--repeats", "1"),
        *("--steps-at-once", "4"),
    )
    one, two = map(json.loads, lines)
    assert (one["rows"], two["rows"], one["base_dtype"]) == (1, 2, "int8")
    assert min(one["tokens_per_second"], one["first_token_s"], one["peak_gib"]) > 0


def test_format_quality_trains_each_format_and_compares(tmp_path: Path) -> None:
    curves = tmp_path / "curves"
    lines = run_script(
        *("format_quality", "--model", str(make_workdir(tmp_path) / "hf")),
        *("--steps", "12", "--rows", "2", "--length", "16", "--held-out-rows", "4"),
        *("--out", str(curves)),
    )
    bf16, *others = map(json.loads, lines)
    assert (bf16["format"], bf16["kl_before"], bf16["of_bfloat16"]) == (
        "bfloat16",
        0,
        1,
    )
    assert [line["format"] for line in others] == ["fp8", "int8", "nf4"]
    assert all(line["kl_before"] > 0 < line["kl_after"] for line in others)
    assert {len(losses) for losses in json.loads(curves.read_text()).values()} == {12}


def test_sweep_time_compares_adapters_together_with_one() -> None:
    (line,) = run_script("sweep_time", "tiny")
    found = json.loads(line)
    assert found["ratio"] > 0
    assert len(found["loss_together"]) == found["adapters"]


def test_packing_gpu_compares_packed_rows_with_dense_and_padded_ones() -> None:
    lines = run_script("packing_gpu", "--tiny", "--cases", "dense", "packed", "padded")
    *cases, last = map(json.loads, lines)
    assert [case["case"] for case in cases] == ["dense", "packed", "padded"]
    assert last["summary"]["packed/padded"] > 0
    assert 0.9 < cases[1]["fill"] <= 1


def test_peers_names_the_libraries_that_are_not_installed(tmp_path: Path) -> None:
    out = str(tmp_path / "lines")
    (line,) = run_script(
        "peers", "E", "E-bfloat16", "--frameworks", "unsloth", "--out", out
    )
    assert line.startswith("unsloth: not measured, ")


def test_table_has_a_row_for_each_workload_and_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    table: Any = importlib.import_module("table")

    line = {"workload": "A", "framework": "jlora", "device": "x", "step_ms": 2}
    (tmp_path / "lines").write_text(f"{json.dumps(line)}\n{json.dumps(line)}\n")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.START}old\n{table.END}after\n")
    monkeypatch.setattr(table, "RESULTS", tmp_path / "lines")
    monkeypatch.setattr(table, "PAGE", page)
    table.main()
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert text.count("| A | jlora | x |") == 1
    assert "old" not in text
