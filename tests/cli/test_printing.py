import sys
from dataclasses import dataclass

import pytest

from jlora.cli.command import run_command
from jlora.cli.printing import unescaped_output
from jlora.errors import CorruptError, printable, warn

HOSTILE = "a\x1b[2Jb\rc\x07d\x9be\u202ef\u2066g\x00h\u2028i\udc80j\x7f"
ESCAPED = r"a\x1b[2Jb\rc\x07d\x9be\u202ef\u2066g\x00h\u2028i\udc80j\x7f"


@dataclass(frozen=True)
class Arguments:
    """Prints."""


def test_control_characters_are_escaped_and_letters_are_not():
    assert printable(HOSTILE) == ESCAPED
    kept = "line\n\ttab é 日本\u3000語 \u200d👩 עברית \\x1b"
    assert printable(kept) == kept


def test_errors_and_warnings_of_a_command_are_escaped(capsys):
    def main(arguments: Arguments) -> None:
        warn(HOSTILE)
        raise CorruptError(HOSTILE)

    assert run_command(main, Arguments, argv=[]) == 4
    assert capsys.readouterr().err == f"warning: {ESCAPED}\nerror: {ESCAPED}\n"


def test_what_a_command_prints_is_escaped(capsys):
    assert run_command(lambda _: print(HOSTILE), Arguments, argv=[]) == 0
    assert capsys.readouterr().out == f"{ESCAPED}\n"


def test_a_library_that_steers_the_terminal_gets_the_stream_itself(capsys):
    before = sys.stdout

    def main(arguments: Arguments) -> None:
        assert sys.stdout.isatty() is before.isatty()
        unescaped_output().write("\x1b[1m")

    assert run_command(main, Arguments, argv=[]) == 0
    assert capsys.readouterr().out == "\x1b[1m"
    assert unescaped_output() is before


@pytest.mark.parametrize("words", [["--no\x1b[2J"], ["x\x1b[2J"]])
def test_words_of_the_command_line_are_escaped(words, capsys):
    assert run_command(lambda _: None, Arguments, argv=words) == 2
    assert "\x1b" not in capsys.readouterr().err
