import shutil

import numpy as np
import pytest
from helpers.commands import evaluated_loss, metrics, succeed

pytestmark = pytest.mark.usefixtures("in_workdir")


def test_evaluate_gives_the_loss_that_the_run_saw_last(run):
    last = metrics(run)[-1]["eval_loss"]
    # One device here, eight there: sums in another order, and six decimals printed.
    assert evaluated_loss("--model", "hf", "--adapter", "run") == pytest.approx(
        last, abs=5e-6
    )


def test_evaluate_of_the_base_gives_the_loss_before_training(run):
    assert evaluated_loss("--model", "hf") > 1.5 * metrics(run)[-1]["eval_loss"]


@pytest.mark.parametrize("more", [["--packing"], ["--batch_size", 2]])
def test_the_loss_does_not_depend_on_rows(more):
    assert evaluated_loss("--model", "hf", *more) == pytest.approx(
        evaluated_loss("--model", "hf"), abs=5e-6
    )


def test_evaluate_prints_loss_perplexity_and_tokens():
    out = succeed("evaluate", "--model", "hf", "--data", "eval.jsonl", "--seq_len", 64)
    loss, perplexity, tokens = (part.split(": ")[1] for part in out.split(" || "))
    assert float(perplexity) == pytest.approx(np.exp(float(loss)), rel=1e-5)
    # " It is a." has 6 tokens, with c and e 7 each ("Ġa" is one token); and 3 ends.
    assert int(tokens) == 6 + 7 + 7 + 3


def test_without_a_length_evaluate_reads_whole_records():
    whole = succeed("evaluate", "--model", "hf", "--data", "eval.jsonl")
    assert float(whole.split()[1]) == pytest.approx(
        evaluated_loss("--model", "hf"), abs=5e-6
    )


def test_evaluate_shows_what_would_be_read(monkeypatch):
    monkeypatch.setattr("jlora.formats.load_params.load_params", pytest.fail)
    out = succeed(
        "evaluate", "--model", "hf", "--data", "chat.jsonl", "--show", "--seq_len", 64
    )
    assert "{+The sum is five.[[<|im_end|>]]+}" in out


def test_a_run_without_its_adapter_folder_is_read_from_its_checkpoint(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    trained = evaluated_loss("--model", "hf", "--adapter", run)
    assert evaluated_loss("--model", "hf", "--adapter", tmp_path / "run") == trained
    assert trained < evaluated_loss("--model", "hf")


def test_a_base_is_evaluated_in_the_format_that_is_asked_for(run):
    flags = ["--model", "hf", "--adapter", "run"]
    exact = evaluated_loss(*flags)
    losses = [evaluated_loss(*flags, "--base_dtype", d) for d in ("bfloat16", "nf4")]
    assert 0 < abs(losses[0] - exact) < abs(losses[1] - exact) < 0.5 * exact + 0.1
