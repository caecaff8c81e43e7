import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from jlora.cli.arguments import parse
from jlora.cli.jlora_command import COMMANDS, main


def test_an_unknown_command_is_answered_with_the_nearest(capsys):
    assert main(["trian", "--model", "m"]) == 2
    assert capsys.readouterr().err == (
        "error: unknown command 'trian'; did you mean 'train'?\n"
    )
    assert main(["xyz"]) == 2
    assert f"'xyz'; there are {', '.join(COMMANDS)}" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_every_command_has_one_line_of_help(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(maxsplit=1) for line in lines if line.startswith("  ")]
    assert [name for name, _ in rows] == list(COMMANDS)
    assert all(text.endswith(".") for _, text in rows)


def test_a_command_is_called_by_its_name_in_help(capsys):
    assert main(["generate", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: jlora generate --model MODEL")


def test_a_failure_of_a_command_is_its_exit_status(capsys):
    assert main(["generate", "--modle", "m"]) == 2
    assert "did you mean --model?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ([], "--dtype"),
        (["--to", "hf"], "--dtype"),
        (["--to", "gguf"], "--type"),
        (["--to=peft"], "--for"),
    ],
)
def test_export_writes_the_merged_model_or_the_adapter(words, flag, capsys):
    assert main(["export", *words, "--help"]) == 0
    text = capsys.readouterr().out
    usage = "usage: jlora export [--to hf|peft|vllm|gguf] ADAPTER OUT [flags]"
    assert text.splitlines()[0] == usage
    assert f"\n  {flag} " in text


@pytest.mark.parametrize("words", [["run", "out"], ["--adapter", "run", "out"]])
def test_export_passes_on_for_whom_it_writes(words, monkeypatch):
    taken = []

    def run(main, arguments, *, argv, program):
        taken.append(parse(arguments, argv))
        return 0

    monkeypatch.setattr("jlora.cli.jlora_command.run_command", run)
    assert main(["export", "--to", "vllm", *words]) == 0
    [got] = taken
    assert (got.adapter, got.out, got.for_) == ("run", "out", "vllm")


@pytest.mark.parametrize("words", [["--to", "onnx"], ["--to"]])
def test_an_export_for_an_unknown_reader_is_refused(words, capsys):
    assert main(["export", *words]) == 2
    assert "expected one of hf, peft, vllm, gguf\n" in capsys.readouterr().err


def test_export_for_a_reader_takes_no_other_reader(capsys):
    words = ["export", "--adapter", "run", "--to", "vllm", "--for", "peft", "out"]
    assert main(words) == 2
    assert "--to vllm says already what --for would say" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_is_full_is_one_message():
    code = "import sys; from jlora.cli.jlora_command import main; sys.exit(main())"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
    message = "error: the output cannot be written: the disk is full\n"
    assert (done.returncode, done.stderr) == (5, message)
