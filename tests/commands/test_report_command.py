import json
import shutil
from pathlib import Path

import pytest
from helpers.commands import STEPS, call, metrics, succeed

from jlora.cli.arguments import parse
from report import Arguments

pytestmark = pytest.mark.usefixtures("in_workdir")


def test_a_report_is_written_again_and_compares_runs(run, tmp_path):
    copies = [shutil.copytree(run, tmp_path / name) for name in ("a", "b")]
    whole = (copies[0] / "report.html").read_bytes()
    (copies[0] / "report.html").unlink()
    assert (
        succeed("report", copies[0]) == f"report written to {copies[0]}/report.html\n"
    )
    assert (copies[0] / "report.html").read_bytes() == whole.replace(b">run", b">a")
    lines = metrics(copies[1])
    last = {**lines[-1], "eval_loss": 0.25}
    file = copies[1] / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines[:-1], last]))
    out = tmp_path / "both.html"
    printed = succeed("report", *copies, "--out", out).splitlines()
    assert printed[0].split() == [
        "run",
        "best",
        "eval_loss",
        "at",
        "step",
        "loss",
        "steps",
    ]
    assert printed[1].split()[:4] == ["1", "b", "0.2500", str(STEPS)]
    assert printed[2].split()[:2] == ["2", "a"]
    assert printed[3] == f"report written to {out}"
    assert "2 runs" in out.read_text()


def test_a_folder_that_is_no_run_is_refused():
    done = call("report", "hf")
    assert done.status == 2
    assert "hf: holds no metrics.jsonl; give the folder of a run" in done.err
    assert not Path("hf/report.html").exists()


def test_the_runs_may_be_words_or_one_list():
    assert parse(Arguments, ["a"]).runs == "a"
    assert parse(Arguments, ["a", "b", "c", "--out", "x"]).runs == ["a", "b", "c"]
    assert parse(Arguments, ["[a,b]"]).runs == ["a", "b"]
