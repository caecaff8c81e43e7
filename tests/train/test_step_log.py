import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.errors import DivergedError
from jlora.report.run_report import Report
from jlora.train.progress import Progress
from jlora.train.step_log import MAX_SKIPPED_IN_A_ROW, StepLog, is_due


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


ONE = arrays()


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
    total_steps: int = 100,
) -> StepLog:
    return StepLog(
        listener,
        Progress(),
        schedule,
        flops_per_token=1.0,
        steps_per_epoch=4,
        log_every=log_every,
        total_steps=total_steps,
        devices=1,
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
    keys = """step epoch loss step_loss learning_rate grad_norm tokens supervised_tokens
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


def test_the_steps_since_the_last_line_are_logged_where_training_ends_early():
    listener = Listener()
    log = make_log(listener, log_every=3)
    for step, loss in enumerate((1.0, 2.0, 3.0, 4.0, 6.0), 1):
        log.add(step, arrays(loss=loss), 0.0)
    log.end()
    assert [line["step"] for line in listener.lines] == [3, 5]
    assert listener.lines[1]["loss"] == pytest.approx(5.0)
    assert listener.lines[1]["step_loss"] == pytest.approx(6.0)
    log.end()
    assert len(listener.lines) == 2


def test_the_time_of_training_is_that_of_all_steps_also_without_a_line():
    log = make_log(Listener(), log_every=9)
    log.add(1, arrays(), 0.0)
    log.flush()
    first = log.training_s
    assert first > 0
    log.add(2, arrays(), 0.0)
    log.flush()
    assert log.training_s > first


def test_waiting_for_data_is_a_mean_over_the_steps_of_a_line():
    listener = Listener()
    log = make_log(listener, log_every=2)
    for step, waited in enumerate([1.0, 3.0, 3.0, 4.0], 1):
        log.add(step, arrays(), waited)
    log.flush()
    assert [line["data_wait_s"] for line in listener.lines] == [1.5, 0.5]


class Clock:
    """Stands in for time.perf_counter; a test moves it on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)


class Running:
    """An array of a step that runs until it is read, which moves the clock on."""

    def __init__(self, value: float, clock: Clock, ends_at: float) -> None:
        self.value, self.clock, self.ends_at = value, clock, ends_at

    def is_ready(self) -> bool:
        return self.clock.now >= self.ends_at

    def __array__(self, *_: Any, **__: Any) -> Any:
        self.clock.now = max(self.clock.now, self.ends_at)
        return np.asarray(self.value)


def test_a_step_that_is_done_ends_when_it_returns_and_pauses_do_not_count(monkeypatch):
    clock, listener = Clock(monkeypatch), Listener()
    log = make_log(listener)
    clock.now += 50  # compiling
    log.restart_clock()
    for step in (1, 2, 3):
        clock.now += step
        log.add(step, arrays(), 0.0)
        if step == 2:
            clock.now += 70  # before it is logged
            log.flush()
            clock.now += 1000  # an evaluation
            log.restart_clock()
    log.flush()
    assert [line["step_time_s"] for line in listener.lines] == [1, 2, 3]
    assert [line["tokens_per_second"] for line in listener.lines] == [5, 2.5, 5 / 3]
    assert log.training_s == 6


def test_a_step_that_still_runs_ends_when_it_is_read(monkeypatch):
    clock, listener = Clock(monkeypatch), Listener()
    log = make_log(listener)
    for step in (1, 2, 3):  # each takes 10 s, and Python is ahead by one
        running = {k: Running(a.item(), clock, 100 + 10 * step) for k, a in ONE.items()}
        clock.now += 1
        log.add(step, running, 0.0)
    log.flush()
    assert [line["step_time_s"] for line in listener.lines] == [10, 10, 10]


def test_the_loss_of_a_line_is_the_mean_of_its_steps_by_supervised_tokens():
    listener = Listener()
    log = make_log(listener, log_every=2)
    for step, (loss, count) in enumerate([(2.0, 1), (4.0, 3), (7.0, 5), (math.nan, 9)]):
        log.add(step + 1, arrays(loss=loss, supervised_tokens=count), 0.0)
    log.flush()
    assert [line["loss"] for line in listener.lines] == [3.5, 7.0]
    assert [line["step_loss"] for line in listener.lines[:1]] == [4.0]
    assert math.isnan(listener.lines[1]["step_loss"])


def test_a_skipped_step_is_reported():
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


@pytest.mark.parametrize(
    ("losses", "what"),
    [
        ([0.0] * 5, "as the batch has no supervised token; .*Look at the data"),
        ([0.0, math.nan, 0.0, 0.0, 0.0], "as loss .* or the batch has no .*Lower"),
        ([math.nan] * 5, "as loss or gradient is not finite; .*Lower"),
    ],
)
def test_the_last_message_says_why_steps_were_skipped(losses, what):
    log = make_log(Listener())
    # A good step between ends what came before.
    log.add(1, arrays(loss=math.nan, skipped=1, in_a_row=1), 0.0)
    log.add(2, arrays(skipped=1), 0.0)
    for row, loss in enumerate(losses, 1):
        log.add(2 + row, arrays(loss=loss, skipped=1 + row, in_a_row=row), 0.0)
    with pytest.raises(DivergedError, match=f"5 steps .* up to step 7 .*{what}"):
        log.flush()


def test_flush_without_a_step_does_nothing():
    listener = Listener()
    make_log(listener).flush()
    assert listener.lines == []


def test_the_learning_rate_is_that_of_the_steps_that_were_applied():
    listener = Listener()
    log = make_log(listener)
    log.add(1, arrays(), 0.0)
    log.add(2, arrays(loss=float("nan"), skipped=1, in_a_row=1), 0.0)
    log.add(3, arrays(skipped=1), 0.0)
    log.flush()
    rates = [line["learning_rate"] for line in listener.lines]
    assert rates == pytest.approx([0.1, 0.1, 0.2])


def test_a_single_step_that_is_not_finite_at_the_end_does_not_end_with_an_error():
    listener = Listener()
    log = make_log(listener)
    log.add(100, arrays(loss=float("nan"), skipped=1, in_a_row=1), 0.0)
    log.flush()
    assert listener.lines[0]["step"] == 100


def test_the_last_steps_that_are_not_finite_end_the_run():
    log = make_log(Listener())
    log.add(100, arrays(loss=float("nan"), skipped=2, in_a_row=2), 0.0)
    with pytest.raises(DivergedError, match="step 98 was the last good one"):
        log.flush()


def test_a_gradient_that_stays_zero_ends_the_run():
    listener = Listener()
    log = make_log(listener)
    for step in range(1, MAX_SKIPPED_IN_A_ROW):
        log.add(step, arrays(grad_norm=0.0), 0.0)
    log.flush()
    assert len(listener.messages) == 1
    log.add(MAX_SKIPPED_IN_A_ROW, arrays(grad_norm=0.0), 0.0)
    with pytest.raises(DivergedError, match="exactly zero for 5 steps in a row"):
        log.flush()


def test_a_loss_of_zero_needs_no_gradient():
    listener = Listener()
    log = make_log(listener)
    for step in range(1, 2 * MAX_SKIPPED_IN_A_ROW):
        log.add(step, arrays(grad_norm=0.0, loss=0.0), 0.0)
    log.flush()
    assert listener.messages == []


def test_a_run_whose_only_step_is_not_finite_has_diverged():
    log = make_log(Listener(), total_steps=1)
    log.add(1, arrays(loss=float("nan"), skipped=1, in_a_row=1), 0.0)
    with pytest.raises(DivergedError, match="step 0 was the last good one"):
        log.flush()
