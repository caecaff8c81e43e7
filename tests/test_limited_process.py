import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from jlora.limited_process import CallError, LimitedProcess, LimitExceeded

SOURCE = """
import ctypes, os, sys

def add(a, b): return a + b
def echo(value): return value
def fail(): raise ValueError("so")
def spin():
    while True: pass
def allocate(size): return len(bytearray(size))
def crash(): ctypes.string_at(0)
def leave(): os._exit(7)
def modules(): return sorted(sys.modules)
def pid(): return os.getpid()
"""


@pytest.fixture
def process(tmp_path, monkeypatch):
    (tmp_path / "limited_functions.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    process = LimitedProcess("limited_functions", memory_bytes=1 << 28)
    yield process
    process.close()


def call(process, function, *arguments, cpu_seconds=0.3):
    return process.call(function, *arguments, cpu_seconds=cpu_seconds)


def test_values_come_back_as_they_were_sent(process):
    value = [1, 1.0, True, None, "a\udc01é\0", {"k": [10**40, -0.0]}, "x" * 10**6]
    assert repr(call(process, "echo", value)) == repr(value)


def test_calls_share_a_process_and_what_they_have_in_common(process):
    pids = {call(process, "pid") for _ in range(3)}
    sums = process.call_each("add", [1], [(2,), (3,)], cpu_seconds=1)
    assert (len(pids), sums) == (1, [3, 4])
    assert pids != {os.getpid()}


def test_exception_comes_back_with_its_name(process):
    with pytest.raises(CallError, match=r"^so$") as caught:
        call(process, "fail")
    assert caught.value.name == "ValueError"


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("spin", (), "more than 0 s of computing time"),
        ("allocate", (1 << 29,), r"more than 0\.25 GiB of memory"),
        ("crash", (), "crashed"),
        ("leave", (), r"crashed \(status 7\)"),
    ],
)
def test_limit_is_reported_and_the_next_call_works(
    process, function, arguments, message
):
    with pytest.raises(LimitExceeded, match=message):
        call(process, function, *arguments)
    assert call(process, "add", 1, 2) == 3


def test_killed_process_is_replaced(process):
    first = call(process, "pid")
    os.kill(first, signal.SIGKILL)
    time.sleep(0.2)
    assert call(process, "pid") != first


def test_interrupt_of_the_whole_group_is_left_to_the_caller(process):
    pid = call(process, "pid")
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, name)
    assert call(process, "pid") == pid


def test_memory_is_watched_where_the_system_does_not_limit_it(process, monkeypatch):
    call(process, "pid")
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(process, "_memory", 1 << 20)
    with pytest.raises(LimitExceeded, match="of memory"):
        call(process, "spin", cpu_seconds=30)


def test_threads_get_their_own_answers(process):
    found = {}
    threads = [
        threading.Thread(
            target=lambda i=i: found.update({i: call(process, "add", i, i)})
        )
        for i in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: 2 * i for i in range(20)}


def test_process_imports_little(process):
    assert not {"jax", "numpy", "tokenizers"} & set(call(process, "modules"))


@pytest.mark.parametrize("ending", ["os.kill(os.getpid(), signal.SIGKILL)", "pass"])
def test_process_ends_with_its_caller(process, tmp_path, ending):
    script = textwrap.dedent(f"""
        import os, signal, sys
        from jlora.limited_process import LimitedProcess
        process = LimitedProcess("limited_functions", memory_bytes=1 << 28)
        print(process.call("pid", cpu_seconds=5), flush=True)
        {ending}
    """)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert done.stderr == b""
    pid = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the process is still there")


def test_closed_standard_streams_are_no_obstacle(process, tmp_path):
    script = "from jlora.limited_process import LimitedProcess as P; import os; " + (
        f"open({str(tmp_path / 'out')!r}, 'w').write(str("
        "P('limited_functions', memory_bytes=1 << 28).call('add', 1, 2, cpu_seconds=5)))"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    subprocess.run(
        f'exec "{sys.executable}" -c "$SCRIPT" <&- >&- 2>&-',
        shell=True,
        env={**os.environ, "PYTHONPATH": path, "SCRIPT": script},
        check=True,
    )
    assert (tmp_path / "out").read_text() == "3"
