import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from jlora.errors import UsageError
from jlora.report.html_report import write_report
from jlora.report.run_folder import run_folders, write_facts, write_generated
from jlora.report.run_report import Report
from jlora.report.trackers import GeneratedText

EVIL = "<script>alert(1)</script>&\"'<img src=x>"
# What a browser shows without loading or running anything.
HARMLESS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "div", "dl"),
    *("dt", "dd", "figure", "figcaption", "svg", "line", "text", "polyline", "circle"),
    *("ul", "li", "span", "pre", "details", "summary", "p", "table", "thead", "tbody"),
    *("tr", "th", "td"),
}


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def make_run(folder: Path, losses: list[float], held_out: Any = (), **settings) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with Report(folder, total_steps=99) as report:
        for step, loss in held_out:
            report.log_evaluation(step, loss, is_best=False)
        for step, loss in enumerate(losses, 1):
            more = {"grad_norm": 1.0, "tokens_per_second": 9.0, "mfu": None}
            report.log(step=step, loss=loss, learning_rate=1e-4, **more)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 0, **settings}))
    return folder


def page_of(*folders: Path) -> Page:
    target = folders[0] / "report.html"
    write_report(folders, target)
    return Page(target.read_text("utf-8"))


def test_a_page_needs_no_network_and_runs_nothing(tmp_path):
    page = page_of(make_run(tmp_path / "run", [3.0, 2.0], [(0, 4.0), (2, 2.5)]))
    assert set(page.tags) <= HARMLESS
    assert not {"src", "href", "style"} & {name for name, _ in page.attributes}
    text = (tmp_path / "run" / "report.html").read_text()
    assert not re.findall(r"https?:|url\(|@import", text)
    assert "default-src 'none'; style-src 'unsafe-inline'" in text
    assert "prefers-color-scheme: dark" in text


def test_a_page_shows_curves_the_best_evaluation_and_the_facts(tmp_path):
    held_out = [(0, 1.0), (1, 4.0), (2, 2.5)]
    run = make_run(tmp_path / "run", [3.0, 2.0], held_out, model="m")
    sample = ["line 1", [["What?", False, False], [" Five.", True, False]]]
    facts = {
        "summary": ["8 records"],
        "samples": [sample],
        "command": "jlora train ...",
    }
    write_facts(
        run, {**facts, "versions": {"jax": "9.9"}, "identity": {"base": "ab12"}}
    )
    page = page_of(run)
    titles = (
        "loss, nats per supervised token,learning rate,gradient norm,tokens per second"
    )
    assert [t for t in page.texts if t in titles.split(",")] != []
    assert page.tags.count("svg") == 4
    assert page.tags.count("circle") == 1
    for text in (
        *("best 2.5000", "2.5000 at step 2", "8 records", "What?", "Five."),
        *("jlora train ...", "jax", "9.9", "base", "ab12"),
    ):
        assert text in page.texts, text
    assert any("model: m" in text for text in page.texts)


def test_what_users_give_is_text_wherever_it_stands(tmp_path):
    name = "<b>&\"x'"
    runs = [
        make_run(tmp_path / name, [3.0], lora=EVIL),
        make_run(tmp_path / "b", [2.0]),
    ]
    for run in runs:
        sample = [EVIL, [[EVIL, True, False]]]
        facts = {"summary": [EVIL], "samples": [sample], "command": EVIL}
        write_facts(run, {**facts, "versions": {EVIL: EVIL}, "identity": {EVIL: EVIL}})
    for page in (page_of(runs[0]), page_of(*runs)):
        assert set(page.tags) <= HARMLESS
        assert name in page.texts
        assert page.texts.count(EVIL) >= 6


@pytest.mark.parametrize(
    "name", ["雪", os.fsdecode(b"\xff"), "a\x1b[31mb", "\u202egnp"]
)
def test_the_title_is_the_name_of_the_folder_without_control_characters(tmp_path, name):
    run = make_run(tmp_path / name, [1.0])
    write_facts(run, {"summary": ["\ud800 \x07"]})
    page_of(run)
    text = (run / "report.html").read_text("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    if name == "雪":
        assert "<h1>雪</h1>" in text


def test_a_run_without_lines_or_with_none_that_is_finite_has_a_page(tmp_path):
    assert page_of(make_run(tmp_path / "none", [])).tags.count("svg") == 0
    page = page_of(make_run(tmp_path / "nan", [float("nan")] * 3))
    assert page.tags.count("svg") == 3
    damaged = make_run(tmp_path / "damaged", [1.0])
    (damaged / "facts.json").write_text("[")
    (damaged / "metrics.jsonl").write_text('{"step": 1, "lo')
    page_of(damaged)


def test_several_runs_are_ranked_by_their_best_evaluation_after_the_first_step(
    tmp_path,
):
    rate = {"learning_rate": 0.1}
    runs = [
        make_run(tmp_path / "a", [3.0, 2.0], [(0, 1.0), (1, 4.0), (2, 3.5)]),
        make_run(tmp_path / "b", [3.0, 2.1], [(2, 3.0)], optim=rate),
        make_run(tmp_path / "c", [0.5], []),
    ]
    page = page_of(*runs)
    cells = [text for text in page.texts if text]
    start = cells.index("1")
    assert cells[start : start + 7] == ["1", "b", "3.0000", "2", "2.1000", "2", "0.1"]
    order = [cells.index(name) for name in ("b", "a", "c")]
    assert order == sorted(order)
    assert "3 runs" in page.texts


def test_the_folder_of_a_sweep_stands_for_its_members(tmp_path):
    sweep = tmp_path / "sweep"
    members = [make_run(sweep / name, [1.0]) for name in ("low", "high")]
    (sweep / "config.yaml").write_text("sweep: s.yaml\n")
    assert list(run_folders(sweep)) == sorted(members)
    assert list(run_folders(members[0])) == [members[0]]


def test_a_folder_without_a_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"holds no metrics\.jsonl"):
        write_report(list(run_folders(tmp_path / "empty")), tmp_path / "report.html")


def test_a_page_is_small_however_long_the_run_is(tmp_path):
    run = make_run(tmp_path / "run", [])
    line = {"loss": 2.0, "learning_rate": 1e-4, "grad_norm": 1.0, "step": 0}
    lines = (json.dumps({**line, "step": step}) for step in range(1, 20_001))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page_of(run)
    assert (run / "report.html").stat().st_size < 100_000


def test_generated_text_is_shown_beside_the_reference_as_text(tmp_path):
    run = make_run(tmp_path / "run", [2.0, 1.0])
    for step, answer in ((0, "no\x1b idea"), (1_000, EVIL)):
        write_generated(run, step, [GeneratedText("ask", "right", answer)])
    page = page_of(run)
    shown = ["ask", "reference", "right", "before training", "no\\x1b idea"]
    shown += ["after step 1,000", EVIL]
    start = page.texts.index("ask")
    assert [text for text in page.texts[start:] if text][: len(shown)] == shown
    assert set(page.tags) <= HARMLESS


@pytest.mark.parametrize("text", ["[", "[1]", '{"a": []}', '{"1": [{"prompt": 2}]}'])
def test_a_file_of_generated_text_that_is_damaged_is_left_out(tmp_path, text):
    run = make_run(tmp_path / "run", [2.0, 1.0])
    (run / "generated.json").write_text(text)
    assert "Held-out prompts" not in page_of(run).texts
