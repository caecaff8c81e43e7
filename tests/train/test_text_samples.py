import json
from collections.abc import Iterator
from typing import Any

import pytest

from jlora.errors import StopRequested
from jlora.report.run_folder import GENERATED
from jlora.report.run_report import Report
from jlora.report.trackers import GeneratedText
from jlora.train.pauses import Pauses
from jlora.train.text_samples import TextSamples


@pytest.fixture
def report(tmp_path) -> Iterator[Any]:
    with Report(tmp_path, total_steps=9) as report:
        yield report


def text(answer: str) -> list[GeneratedText]:
    return [GeneratedText("ask", "right", answer)]


def test_samples_before_and_the_newest_after_training_are_kept_and_tracked(
    report, tmp_path, capsys
):
    pauses, shown = Pauses([]), []
    report.tracking.show = lambda texts, step: shown.append((step, texts))
    samples = TextSamples(lambda params: text(params["answer"]), pauses)
    for step, answer in ((0, "wrong"), (5, "better"), (9, "right")):
        samples.take(report, {"answer": answer}, step)
    found = json.loads((tmp_path / GENERATED).read_text())
    assert {step: texts[0]["text"] for step, texts in found.items()} == {
        "0": "wrong",
        "9": "right",
    }
    assert shown == [(0, text("wrong")), (5, text("better")), (9, text("right"))]
    assert "step 9: 1 sample generated in " in capsys.readouterr().out
    assert pauses.seconds["generating samples"] > 0


def test_a_run_that_begins_anew_forgets_what_was_generated(report, tmp_path):
    samples = TextSamples(lambda params: text("x"), Pauses([]))
    for step in (0, 9, 0):
        samples.take(report, {}, step)
    assert list(json.loads((tmp_path / GENERATED).read_text())) == ["0"]


def test_samples_that_fail_are_warned_of_once_and_do_not_end_the_run(
    report, tmp_path, capsys
):
    def fail(params: Any) -> Any:
        raise RuntimeError("RESOURCE_EXHAUSTED: 3 GiB\nmore")

    samples = TextSamples(fail, Pauses([]))
    samples.take(report, {}, 0)
    samples.take(report, {}, 9)
    assert capsys.readouterr().err == (
        "warning: no samples are generated (RuntimeError: RESOURCE_EXHAUSTED: 3 GiB)\n"
    )
    assert not (tmp_path / GENERATED).exists()


def test_a_request_to_stop_is_not_taken_for_a_failure(report):
    def stop(params: Any) -> Any:
        raise StopRequested("no step was made")

    with pytest.raises(StopRequested):
        TextSamples(stop, Pauses([])).take(report, {}, 0)
