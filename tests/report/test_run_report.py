import json
from pathlib import Path
from typing import Any

import pytest

from jlora.report.html_report import write_report
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


DAMAGED = {
    "cut": b'{"step": 3, "lo',
    "not JSON": b"{}x",
    "zeros": b"\0\0",
    "a flipped byte": b'{"step": 3, "loss": 2.0, "le\xe1rning_rate": 0.0001}',
    "a list": b"[1]",
    "a number": b"3",
    "no step": b'{"loss": 2.0, "learning_rate": 0.1}',
    "a step in quotes": b'{"step": "3", "loss": 2.0, "learning_rate": 0.1}',
    "a step that is true": b'{"step": true, "loss": 2.0, "learning_rate": 0.1}',
    "no rate": b'{"step": 3, "loss": 2.0}',
    "a loss in quotes": b'{"step": 3, "loss": "2.0", "learning_rate": 0.1}',
    "an infinite loss": b'{"step": 3, "loss": 1e999, "learning_rate": 0.1}',
    "a loss in a list": b'{"step": 3, "eval_loss": [1]}',
    "nothing but a step": b'{"step": 3}',
    "nested deeply": b'{"step": ' + b"[" * 100_000,
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_is_kept_aside_and_the_run_goes_on(
    tmp_path, capsys, line, place
):
    write(tmp_path, 1, 2)
    file = tmp_path / "metrics.jsonl"
    lines = file.read_bytes().splitlines()
    lines.insert(place, line)
    file.write_bytes(b"\n".join(lines))
    assert write_report([tmp_path], tmp_path / "report.html")[0].steps == 2
    capsys.readouterr()
    write(tmp_path, 3, start_step=2)
    assert steps_in(tmp_path) == [1, 2, 3]
    assert (tmp_path / "metrics.damaged").read_bytes() == line + b"\n"
    assert capsys.readouterr().err == (
        f"warning: {file}: 1 damaged line moved to metrics.damaged; the run goes on\n"
    )
    write(tmp_path, start_step=3)
    assert capsys.readouterr().err == ""


def test_a_run_that_begins_drops_the_evaluation_of_step_0(tmp_path):
    write(tmp_path, 0, 1)
    write(tmp_path, 0)
    assert steps_in(tmp_path) == [0]


def test_an_evaluation_is_a_line_of_its_own_and_the_best_is_marked(tmp_path, capsys):
    with Report(tmp_path, total_steps=9) as report:
        report.log_evaluation(3, 2.5, is_best=False)
        report.log_evaluation(6, 1.25, is_best=True)
    assert capsys.readouterr().out == (
        "step 3/9  eval_loss 2.5000\nstep 6/9  eval_loss 1.2500  best so far\n"
    )
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 3, "eval_loss": 2.5},
        {"step": 6, "eval_loss": 1.25},
    ]


def test_an_evaluation_stays_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with Report(tmp_path, total_steps=9) as report:
        report.log_evaluation(3, 2.5, is_best=False)
        report.log(step=4, **LINE)
    shown = capsys.readouterr().out
    assert "step 3/9  eval_loss 2.5000\n" in shown.replace("\r", "")


def test_a_log_without_damage_stays_as_it_is(tmp_path):
    write(tmp_path, 1, 2)
    with Report(tmp_path, total_steps=9, start_step=1) as report:
        report.log(step=2, loss=float("nan"), learning_rate=0.1)
        report.log_evaluation(2, 1.5, is_best=True)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    write(tmp_path, start_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert not (tmp_path / "metrics.damaged").exists()


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
