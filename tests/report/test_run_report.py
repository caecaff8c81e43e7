import json
from pathlib import Path
from typing import Any

import pytest

from jlora.report.metrics_file import read_metrics
from jlora.report.run_report import Report

LINE = {"loss": 2.0, "learning_rate": 1e-4}


def write(run: Path, *steps: int, start_step: int = 0, **metrics: Any) -> None:
    with Report(run, total_steps=9, start_step=start_step) as report:
        for step in steps:
            report.log(step=step, **{**LINE, **metrics})


def steps_in(run: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run / "metrics.jsonl")]


def test_every_logged_step_is_one_json_object_on_its_line(tmp_path):
    write(tmp_path, 1, 2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, **LINE},
        {"step": 2, **LINE},
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_numbers_become_null_and_are_named(tmp_path, value):
    write(tmp_path, 1, loss=value)
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=pytest.fail)
    assert line["loss"] is None
    assert line["non_finite"] == ["loss"]


def test_a_resumed_report_drops_the_lines_after_the_restored_step(tmp_path):
    write(tmp_path, 1, 2, 3, 4)
    write(tmp_path, 3, start_step=2)
    assert steps_in(tmp_path) == [1, 2, 3]


def test_a_new_run_in_the_folder_drops_all_lines(tmp_path):
    write(tmp_path, 1, 2)
    write(tmp_path, 1)
    assert steps_in(tmp_path) == [1]


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', "\x00\x00", "{}x", "[1]", "3"])
def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path, rest):
    write(tmp_path, 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(rest)
    write(tmp_path, 3, start_step=2)
    assert steps_in(tmp_path) == [1, 2, 3]


def test_without_a_terminal_a_step_is_a_plain_line(tmp_path, capsys):
    write(tmp_path, 3, tokens_per_second=1234.5)
    assert capsys.readouterr().out == (
        "step 3/9  loss 2.0000  lr 1.00e-04  1,234 tokens/s\n"
    )


def test_on_a_terminal_a_progress_bar_is_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    write(tmp_path, 9)
    assert "9/9" in capsys.readouterr().out
