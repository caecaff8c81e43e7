import ml_dtypes
import pytest
from helpers.tiny import CONFIG, tensors, write_hf

from convert.from_hf import Arguments, main
from jlora.cli.command import run_command
from jlora.formats.base.base_reader import open_base


@pytest.fixture
def hf(tmp_path):
    return write_hf(tmp_path / "hf", CONFIG, tensors(CONFIG, ml_dtypes.bfloat16))


def command(*words):
    return run_command(main, Arguments, argv=words)


def test_command_converts_and_prints_the_facts(hf, tmp_path, capsys):
    assert command(str(hf), str(tmp_path / "out"), "--dtype", "bfloat16") == 0
    printed = capsys.readouterr().out
    digest = open_base(tmp_path / "out").provenance["content_digest"]
    for fact in ("4,560", "bfloat16 (21)", "default, theta 10,000", digest):
        assert fact in printed


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--dtype", "int8"], 2, "dtype"),
        (["--overwite"], 2, "did you mean --overwrite"),
    ],
)
def test_command_refuses_with_the_exit_status(
    hf, tmp_path, capsys, words, status, message
):
    assert command(str(hf), str(tmp_path / "out"), *words) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_looks_at_the_target_before_the_source(hf, capsys):
    assert command("no/such/model", str(hf)) == 2
    assert "add --overwrite" in capsys.readouterr().err


def test_second_conversion_needs_overwrite(hf, tmp_path, capsys):
    words = (str(hf), str(tmp_path / "out"))
    assert [command(*words), command(*words), command(*words, "--overwrite")] == [
        0,
        2,
        0,
    ]
    assert "exists and is not empty" in capsys.readouterr().err
