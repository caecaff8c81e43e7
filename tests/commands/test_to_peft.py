import pytest
from helpers.adapters import changed_copy, files, golden
from helpers.exports import peft_for

from convert.to_peft import Arguments as ToPeft
from convert.to_peft import main as to_peft
from jlora.cli.command import run_command
from jlora.errors import UsageError


@pytest.mark.parametrize("reader", ["peft", "vllm", "gguf"])
def test_an_adapter_is_written_with_the_same_bytes_twice(reader, tmp_path):
    folder = golden("patterns").folder
    for name in "ab":
        peft_for(reader, folder, tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_writing_what_was_written_changes_nothing(tmp_path):
    peft_for("peft", golden("regex").folder, tmp_path / "a")
    peft_for("peft", tmp_path / "a", tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_an_adapter_is_not_written_over_its_source(tmp_path):
    folder = changed_copy(tmp_path / "adapter", "basic")
    arguments = ToPeft(out=str(folder), adapter=str(folder), overwrite=True)
    with pytest.raises(UsageError, match="the source"):
        to_peft(arguments)


def test_the_adapter_command_takes_its_reader_as_a_flag(out, capsys):
    words = ["--adapter", str(golden("basic").folder), "--for", "vllm", str(out)]
    assert run_command(to_peft, ToPeft, argv=words) == 0
    assert "written for vllm" in capsys.readouterr().out
