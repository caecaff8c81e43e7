import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from jlora.errors import DivergedError
from jlora.report.run_report import Report, plot, read_metrics, show_samples
from jlora.train.step_log import MAX_SKIPPED_IN_A_ROW, StepLog, is_due

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


def test_the_plot_is_a_png(tmp_path):
    write(tmp_path, 1, 2)
    with Report(tmp_path, total_steps=9, start_step=2) as report:
        report.log(step=2, eval_loss=1.5)
    target = plot(tmp_path)
    assert target == tmp_path / "report.png"
    assert target is not None
    assert target.read_bytes().startswith(b"\x89PNG")


def test_nothing_logged_is_no_plot(tmp_path):
    assert plot(tmp_path) is None
    assert not (tmp_path / "report.png").exists()


@pytest.mark.parametrize(
    ("step", "every", "last", "expected"),
    [
        (4, 2, 9, True),
        (5, 2, 9, False),
        (9, 2, 9, True),
        (9, 0, 9, True),
        (4, 0, 9, False),
    ],
)
def test_a_step_is_due_every_so_often_and_at_the_end(step, every, last, expected):
    assert is_due(step, every, last) is expected


def arrays(**changes: float) -> dict[str, Any]:
    values = {
        "loss": 2.0,
        "grad_norm": 1.0,
        "supervised_tokens": 3,
        "tokens": 5,
        "skipped": 0,
        "in_a_row": 0,
    }
    return {name: jnp.asarray(x) for name, x in (values | changes).items()}


class Listener(Report):
    """Keeps what a StepLog reports."""

    def __init__(self) -> None:  # no file and no progress bar
        self.lines: list[dict[str, Any]] = []
        self.messages: list[str] = []

    def log(self, **metrics: Any) -> None:
        self.lines.append(metrics)

    def say(self, message: str) -> None:
        self.messages.append(message)


def make_log(
    listener: Listener,
    log_every: int = 1,
    schedule: Any = lambda step: 0.1 * (step + 1),
) -> StepLog:
    return StepLog(
        listener,
        schedule,
        flops_per_token=1.0,
        steps_per_epoch=4,
        log_every=log_every,
        total_steps=100,
    )


def test_no_learning_rate_is_computed_while_steps_run():
    asked = []

    def schedule(steps: Any) -> Any:
        asked.append(steps)
        return 0.1 * (steps + 1)

    listener = Listener()
    log = make_log(listener, schedule=schedule)
    before = len(asked)
    log.add(2, arrays(), 0.0)
    log.flush()
    assert len(asked) == before
    assert listener.lines[0]["learning_rate"] == pytest.approx(0.2)


def test_a_line_has_every_key_of_the_design():
    listener = Listener()
    log = make_log(listener)
    log.add(2, arrays(), 0.0)
    log.flush()
    keys = """step epoch loss learning_rate grad_norm tokens supervised_tokens
    tokens_per_second step_time_s data_wait_s mfu peak_memory_bytes"""
    assert set(keys.split()) <= listener.lines[0].keys()
    assert listener.lines[0]["step"] == 2
    assert listener.lines[0]["epoch"] == 0.5
    assert listener.lines[0]["learning_rate"] == pytest.approx(0.2)


def test_a_step_is_logged_when_the_next_one_is_under_way():
    listener = Listener()
    log = make_log(listener)
    log.add(1, arrays(), 0.0)
    assert listener.lines == []
    log.add(2, arrays(), 0.0)
    assert [line["step"] for line in listener.lines] == [1]


def test_log_every_leaves_steps_out():
    listener = Listener()
    log = make_log(listener, log_every=2)
    for step in range(1, 6):
        log.add(step, arrays(), 0.0)
    log.flush()
    assert [line["step"] for line in listener.lines] == [2, 4]


def test_waiting_for_data_is_a_mean_over_the_steps_of_a_line():
    listener = Listener()
    log = make_log(listener, log_every=2)
    for step, waited in enumerate([1.0, 3.0, 3.0, 4.0], 1):
        log.add(step, arrays(), waited)
    log.flush()
    assert [line["data_wait_s"] for line in listener.lines] == [1.5, 0.5]


def test_a_skipped_step_is_told():
    listener = Listener()
    log = make_log(listener)
    log.add(3, arrays(loss=float("nan"), skipped=1, in_a_row=1), 0.0)
    log.flush()
    assert listener.messages == [
        "step 3: loss or gradient is not finite; nothing was changed"
    ]


def test_too_many_skipped_steps_in_a_row_end_the_run_with_the_last_good_step():
    log = make_log(Listener())
    log.add(9, arrays(skipped=7, in_a_row=MAX_SKIPPED_IN_A_ROW), 0.0)
    with pytest.raises(DivergedError, match=r"7 in all.*step 4 was the last good"):
        log.flush()


def test_flush_without_a_step_does_nothing():
    listener = Listener()
    make_log(listener).flush()
    assert listener.lines == []


def test_samples_mark_what_is_learnt_without_a_terminal(capsys):
    show_samples([("a.jsonl, line 1", [("[bold] ask ", False), ("answer", True)])])
    assert capsys.readouterr().out == "a.jsonl, line 1\n[bold] ask {+answer+}\n\n"


def test_samples_are_coloured_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    show_samples([("title", [("ask ", False), ("answer", True)])])
    out = capsys.readouterr().out
    assert "\x1b[1;32manswer\x1b[0m" in out
    assert "{+" not in out
