import struct
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from tensorboardX.proto import event_pb2

from jlora.report import tracking
from jlora.report.metrics_file import read_metrics
from jlora.report.run_report import Report
from jlora.report.trackers import TRACKERS, GeneratedText

PROTO: Any = event_pb2
LINE = {"loss": 2.0, "learning_rate": 1e-4, "mfu": None}
TEXT = GeneratedText("What is a?", "It is a.", "a <b>\n```")


class FakeRun:
    """Keeps every call to it, as wandb's and trackio's runs are called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, Any]] = []
        self.summary, self.url, self.dir = {}, "", "run/wandb/offline-1/files"

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **more: self.calls.append((name, args, more))

    def logged(self) -> list[dict[str, Any]]:
        return [args[0] | more for name, args, more in self.calls if name == "log"]


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: package)


@pytest.fixture
def fake(monkeypatch):
    """wandb and trackio without the packages: `fake.run`, and `fake.given` to init."""
    found = SimpleNamespace(run=FakeRun(), given=[], key=False, asked=[])

    def init(**given: Any) -> FakeRun:
        found.given.append(given)
        return found.run

    def login(prompt: bool) -> bool:
        found.asked.append(prompt)
        return found.key

    wandb = SimpleNamespace(
        init=init, login=login, Settings=dict, Table=lambda names, rows: rows
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trackio = SimpleNamespace(init=init, Markdown=lambda text: text)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    return found


def report(run: Path, name: str, *steps: int, start_step: int = 0, **more: Any) -> None:
    """Writes the log of a run with one tracker, as a run does."""
    project = {} if name == "tensorboard" else {"project": "mine"}
    settings = {
        "output_dir": str(run),
        "report": {"to": [name]} | project,
        "lora": {"r": 8},
    }
    with Report(run, total_steps=9, start_step=start_step) as log:
        log.tracking.start(settings, start_step=start_step, in_sweep=False, say=log.say)
        for step in steps:
            log.log(step=step, **{**LINE, **more})
        last = max(steps, default=0)
        log.log_evaluation(last, 1.5, is_best=True)
        log.tracking.show([TEXT], last)
        log.tracking.summarise({"best_eval_loss": 1.5}, last)


def events(run: Path) -> list[list[Any]]:
    """The events of every file that TensorBoard would read, the oldest first."""
    found = []
    for file in sorted((run / "tensorboard").iterdir()):
        data, place, read = file.read_bytes(), 0, []
        while place < len(data):
            (size,) = struct.unpack_from("<Q", data, place)
            read.append(PROTO.Event.FromString(data[place + 12 : place + 12 + size]))
            place += 16 + size
        found.append(read)
    return found


def scalars(read: list[Any]) -> dict[tuple[str, int], float]:
    return {
        (value.tag, event.step): value.simple_value
        for event in read
        for value in event.summary.value
        if value.WhichOneof("value") == "simple_value"
    }


def texts(read: list[Any]) -> dict[str, str]:
    return {
        value.tag.split("/")[0]: value.tensor.string_val[0].decode()
        for event in read
        for value in event.summary.value
        if value.WhichOneof("value") == "tensor"
    }


def test_tensorboard_gets_metrics_with_their_steps_texts_and_the_config(tmp_path):
    report(tmp_path, "tensorboard", 1, 2, grad_norm=float("nan"))
    [read] = events(tmp_path)
    assert scalars(read) == pytest.approx(
        {
            ("train/loss", 1): 2.0,
            ("train/learning_rate", 1): 1e-4,
            ("train/loss", 2): 2.0,
            ("train/learning_rate", 2): 1e-4,
            ("eval/loss", 2): 1.5,
        }
    )
    found = texts(read)
    assert "      r: 8" in found["config"]
    assert "    What is a?" in found["samples"]
    assert "    a <b>\n    ```" in found["samples"]
    assert "| best_eval_loss | 1.5 |" in found["summary"]


@pytest.mark.parametrize(("start_step", "purged"), [(0, 0), (1, 2)])
def test_a_run_that_goes_on_hides_what_tensorboard_has_of_later_steps(
    tmp_path, start_step, purged
):
    report(tmp_path, "tensorboard", 1, 2, 3)
    [file] = (tmp_path / "tensorboard").iterdir()
    file.rename(file.with_name("events.out.tfevents.0"))  # of another second
    report(tmp_path, "tensorboard", start_step + 1, start_step=start_step)
    [_, again] = events(tmp_path)
    begins = [event.step for event in again if event.HasField("session_log")]
    assert begins == [purged]
    assert ("train/loss", start_step + 1) in scalars(again)


def test_wandb_without_a_key_stays_offline_says_so_and_asks_for_none(
    tmp_path, fake, capsys
):
    report(tmp_path, "wandb", 1)
    assert (fake.given[0]["mode"], fake.asked) == ("offline", [False])
    out = capsys.readouterr().out
    assert "wandb has no API key, so nothing is sent" in out
    assert "`wandb sync run/wandb/offline-1`" in out


@pytest.mark.parametrize("mode", [None, "disabled", "online"])
def test_wandb_with_a_key_or_a_mode_does_as_the_user_says(
    tmp_path, fake, monkeypatch, mode
):
    fake.key = mode is None
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    report(tmp_path, "wandb", 1)
    assert fake.given[0]["mode"] is None


def test_wandb_gets_a_run_with_its_config_metrics_samples_and_summary(tmp_path, fake):
    report(tmp_path, "wandb", 1)
    given = fake.given[0]
    assert (given["project"], given["name"]) == ("mine", tmp_path.name)
    assert (given["resume"], given["config"]["lora"]) == ("allow", {"r": 8})
    step = {"train/global_step": 1}
    assert fake.run.logged() == [
        {"train/loss": 2.0, "train/learning_rate": 1e-4, **step},
        {"eval/loss": 1.5, **step},
        {"samples/step_1": [["What is a?", "a <b>\n```", "It is a."]], **step},
    ]
    assert fake.run.summary == {"best_eval_loss": 1.5}
    assert fake.run.calls[-1] == ("finish", (), {"exit_code": 0})


def test_trackio_gets_metrics_samples_and_summary_with_their_steps(tmp_path, fake):
    report(tmp_path, "trackio", 1)
    losses, held_out, samples, summary = fake.run.logged()
    assert losses == {"train/loss": 2.0, "train/learning_rate": 1e-4, "step": 1}
    assert held_out == {"eval/loss": 1.5, "step": 1}
    assert "What is a?" in samples["samples"]
    assert summary == {"summary/best_eval_loss": 1.5, "step": 1}


@pytest.mark.parametrize(("name", "key"), [("wandb", "id"), ("trackio", "name")])
def test_a_run_that_goes_on_is_the_same_run_in_the_tracker(tmp_path, fake, name, key):
    for start_step in (0, 1, 0):
        report(tmp_path, name, start_step + 1, start_step=start_step)
    begun, resumed, anew = (given[key] for given in fake.given)
    assert begun == resumed != anew


def test_a_tracker_that_fails_is_warned_of_once_and_the_log_goes_on(
    tmp_path, monkeypatch, capsys
):
    def fail(run: Any) -> Any:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setitem(TRACKERS, "wandb", fail)
    report(tmp_path, "wandb", 1, 2)
    assert capsys.readouterr().err == (
        "warning: wandb failed and gets nothing more of this run, which goes on "
        "(ConnectionError: no route to host)\n"
    )
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [
        *(1, 2, 2)
    ]


def test_a_tracker_that_hangs_is_waited_for_only_so_long(tmp_path, monkeypatch, capsys):
    ended = threading.Event()
    monkeypatch.setitem(TRACKERS, "trackio", lambda run: ended.wait(60) and MagicMock())
    monkeypatch.setattr(tracking, "PATIENCE_S", 0.1)
    report(tmp_path, "trackio", 1)
    assert "trackio did not take all of this run in 0 s" in capsys.readouterr().err
    ended.set()


def test_trackers_of_several_runs_that_hang_share_one_wait(
    tmp_path, monkeypatch, capsys
):
    ended = threading.Event()
    monkeypatch.setitem(TRACKERS, "trackio", lambda run: ended.wait(60) and MagicMock())
    monkeypatch.setattr(tracking, "PATIENCE_S", 1.0)
    runs = [tracking.Tracking() for _ in range(5)]
    settings = {"output_dir": str(tmp_path), "report": {"to": "trackio"}}
    for run in runs:
        run.start(settings, start_step=0, in_sweep=True, say=print)
    began = time.monotonic()
    for run in runs:
        run.end(failed=False)
    for run in runs:
        run.close(failed=False)
    assert 1 <= time.monotonic() - began < 3
    assert capsys.readouterr().err.count("did not take all of this run") == 5
    ended.set()


def test_a_run_that_failed_is_marked(tmp_path, fake):
    settings = {"output_dir": str(tmp_path), "report": {"to": "wandb"}}
    log = Report(tmp_path, total_steps=9)
    log.tracking.start(settings, start_step=0, in_sweep=True, say=log.say)
    log.__exit__(RuntimeError, RuntimeError(), None)
    assert fake.given[0]["group"] == tmp_path.parent.name
    assert fake.run.calls[-1] == ("finish", (), {"exit_code": 1})
