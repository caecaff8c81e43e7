import signal
import subprocess
import sys

import pytest

from jlora.errors import StopRequested
from jlora.train.stopping import BEFORE_TRAINING, stop_requests

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PROGRAM = """
import signal
from jlora.train.stopping import stop_requests
with stop_requests() as stop:
    signal.raise_signal({first})
    print(stop.is_set(), flush=True)
    signal.raise_signal({second})
    print("alive")
"""
# In C, which no handler of Python's interrupts, as compiling is.
IN_C = """
import hashlib
from jlora.train.stopping import stop_requests
with stop_requests() as stop:
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def start(program: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", program]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("second", SIGNALS)
@pytest.mark.parametrize("first", SIGNALS)
def test_the_first_signal_asks_and_the_second_of_either_kind_kills(first, second):
    process = start(PROGRAM.format(first=int(first), second=int(second)))
    out, _ = process.communicate(timeout=60)
    assert (out, process.returncode) == ("True\n", -second)


def test_code_outside_python_neither_delays_the_answer_nor_the_second_signal():
    with start(IN_C) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == f"{BEFORE_TRAINING}\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == -signal.SIGINT


def test_the_answer_is_printed_once_and_before_the_end(capsys):
    with stop_requests() as stop:
        stop.answer = "saved first"
        signal.raise_signal(signal.SIGTERM)
    assert capsys.readouterr().err == "saved first\n"


def test_a_request_ends_a_body_that_allows_it_and_the_next_check_elsewhere():
    with stop_requests() as stop:
        stop.check()
        with pytest.raises(StopRequested), stop.ends_body():
            signal.raise_signal(signal.SIGINT)
        begun: list[int] = []
        with pytest.raises(StopRequested), stop.ends_body():
            begun.append(1)
        assert begun == []
    with stop_requests() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(StopRequested, match="no step was made"):
            stop.check()


def test_one_of_several_processes_does_not_end_alone(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with stop_requests() as stop, stop.ends_body():
        signal.raise_signal(signal.SIGINT)
    stop.check()
    assert stop.is_set()


def test_the_handlers_from_before_are_back_afterwards():
    before = [signal.getsignal(number) for number in SIGNALS]
    with stop_requests() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
    assert [signal.getsignal(number) for number in SIGNALS] == before
