import pytest

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
    with pytest.raises(SystemExit, match="0"):
        main(["generate", "--help"])
    assert capsys.readouterr().out.startswith("usage: jlora generate --model MODEL")


def test_a_failure_of_a_command_is_its_exit_status(capsys):
    assert main(["generate", "--modle", "m"]) == 2
    assert "did you mean --model?" in capsys.readouterr().err
