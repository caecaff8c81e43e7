import pytest
from helpers.flag_cases import Arguments, Placed

import train
from jlora.cli.command import run_command


@pytest.fixture
def help_lines(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")

    def lines(cls: type) -> list[str]:
        assert run_command(print, cls, argv=["--help"]) == 0
        return capsys.readouterr().out.splitlines()

    return lines


def test_help_has_meaning_type_and_default_of_a_flag_on_one_line(help_lines):
    lines = help_lines(Arguments)
    assert "Do the thing." in lines
    for name, rest in (
        ("--model", "Where the model is. (text, required)"),
        ("--plan", "Only say what would be done. (true or false, default false)"),
        ("--when", "When to do it. (one of auto, never, default auto)"),
        ("--for", "Whom it is for. (text, default me)"),
        ("--group.rank", "Rank of the update. (integer, default 8)"),
    ):
        shown = [line.split(maxsplit=1) for line in lines if line.startswith("  --")]
        assert [text for flag, text in shown if flag == name] == [rest]


def test_help_names_what_is_required_in_its_first_line(help_lines):
    assert help_lines(Arguments)[0].endswith(" --model MODEL [flags]")
    assert help_lines(Placed)[0].endswith(" MODEL [flags]")


def test_help_of_train_says_something_about_every_flag(help_lines):
    lines = [line for line in help_lines(train.Arguments) if "  --" in line]
    assert len(lines) > 40
    assert [line for line in lines if ". (" not in line] == [
        line
        for line in lines
        if any(name in line for name in ("--config", "--schema", "--help"))
    ]


def test_a_field_of_peft_that_changes_nothing_is_not_shown(help_lines):
    assert "task_type" not in "".join(help_lines(train.Arguments))
