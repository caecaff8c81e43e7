"""A Mistral with an attention window of 48 against the same weights as a Llama."""

import json
import shutil

import pytest
from helpers.commands import call, losses, succeed, train_flags

from jlora.config import llama_config

pytestmark = pytest.mark.usefixtures("in_workdir")
WINDOW = 48


@pytest.fixture(scope="module")
def mistral(workdir):
    """The model `hf` as a Mistral."""
    folder = workdir / "mistral"
    shutil.copytree(workdir / "hf", folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    text = json.dumps(config | names | {"sliding_window": WINDOW})
    (folder / "config.json").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def unsaid():
    llama_config._say_within.cache_clear()


def said(name: str) -> str:
    return (
        f"warning: {name} is within the model's sliding_window={WINDOW}, where it is the "
        "same as full attention; longer texts are refused\n"
    )


def trained(run, *flags: object):
    return call("train", *train_flags(run, "--train.max_steps", 3, *flags))


def test_training_within_the_window_is_that_of_full_attention(mistral, tmp_path):
    plain = trained(tmp_path / "a", "--data.seq_len", WINDOW)
    own = trained(tmp_path / "b", "--data.seq_len", WINDOW, "--model", mistral)
    assert (plain.status, plain.err) == (0, "")
    assert (own.status, own.err) == (0, said("data.seq_len"))
    assert losses(tmp_path / "b") == losses(tmp_path / "a")


def test_longer_rows_are_refused(mistral, tmp_path):
    for name, flags in {
        "train": train_flags(tmp_path / "a", "--model", mistral),  # rows of 64
        "evaluate": ["--model", mistral, "--data", "eval.jsonl", "--data.seq_len", 64],
    }.items():
        status, _, err = call(name, *flags)
        assert status == 3
        assert f"seq_len=64 exceeds the model's sliding_window={WINDOW}" in err
    assert not (tmp_path / "a").exists()


def test_evaluation_reads_rows_of_the_window_by_default(mistral):
    flags = ("--data", "eval.jsonl")
    status, out, err = call("evaluate", "--model", mistral, *flags)
    assert (status, err) == (0, said("data.seq_len"))
    assert out == succeed("evaluate", "--model", "hf", *flags, "--data.seq_len", WINDOW)


def test_text_is_generated_up_to_the_window(mistral):
    flags = ("--prompt", "What is a?", "--max_new_tokens")
    status, out, err = call("generate", "--model", mistral, *flags, 30)
    assert status == 0
    assert err.startswith(said("prompt + max_new_tokens"))
    assert out == call("generate", "--model", "hf", *flags, 30).out
    status, _, err = call("generate", "--model", mistral, *flags, WINDOW)
    assert status == 3
    assert f"exceeds the model's sliding_window={WINDOW}" in err
    assert call("generate", "--model", mistral, *flags[:2]).status == 0


def test_base_and_export_keep_the_window(mistral, run, tmp_path):
    succeed("convert.from_hf", mistral, tmp_path / "base")
    assert f"a window of {WINDOW}" in succeed("convert.info", tmp_path / "base")
    out = tmp_path / "out"
    flags = ("--model", tmp_path / "base", "--adapter", run)
    told = succeed("convert.to_hf", *flags, out)
    assert f"note: sliding_window={WINDOW}: llama.cpp ignores it" in told
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["sliding_window"]) == ("mistral", WINDOW)
