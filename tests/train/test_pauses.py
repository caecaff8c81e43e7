from typing import Any

import pytest

from jlora.train.pauses import Pauses, duration


class Timed:
    def __init__(self, events: list[Any]) -> None:
        self.events = events

    def flush(self) -> None:
        self.events.append("flush")

    def restart_clock(self) -> None:
        self.events.append("restart")


def test_steps_end_before_a_pause_and_their_clock_goes_on_after_it(monkeypatch):
    events: list[Any] = []
    times = iter([10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    pauses = Pauses([Timed(events)])
    for _ in range(2):
        with pauses.spent("saving"):
            events.append("body")
    assert events == ["flush", "body", "restart"] * 2
    assert pauses.seconds == {"saving": 4.0}


def test_compiling_is_said_before_and_after(capsys):
    pauses = Pauses([])
    with pauses.compiling("the train step"):
        assert capsys.readouterr().out == "compiling the train step ...\n"
    assert capsys.readouterr().out == "compiled in 0.0 s\n"
    assert list(pauses.seconds) == ["compiling"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_a_duration_is_said_in_the_units_that_fit(seconds, text):
    assert duration(seconds) == text
