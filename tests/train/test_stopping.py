import signal
import subprocess
import sys

import pytest

from jlora.train.stopping import stop_requests

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


@pytest.mark.parametrize("second", SIGNALS)
@pytest.mark.parametrize("first", SIGNALS)
def test_the_first_signal_asks_and_the_second_of_either_kind_kills(first, second):
    program = PROGRAM.format(first=int(first), second=int(second))
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60
    )
    assert (done.stdout, done.returncode) == ("True\n", -second)


def test_the_handlers_from_before_are_back_afterwards():
    before = [signal.getsignal(number) for number in SIGNALS]
    with stop_requests() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
    assert [signal.getsignal(number) for number in SIGNALS] == before
