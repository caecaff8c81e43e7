import json
import re
import shutil

import numpy as np
import pytest
import sacrebleu
from helpers.commands import call, evaluated_loss, metrics, succeed
from helpers.data_cases import chat, write_rows

pytestmark = pytest.mark.usefixtures("in_workdir")


def test_evaluate_gives_the_loss_that_the_run_saw_last(run):
    last = metrics(run)[-1]["eval_loss"]
    # One device here, eight there: sums in another order, and six decimals printed.
    assert evaluated_loss("--model", "hf", "--adapter", "run") == pytest.approx(
        last, abs=5e-6
    )


def test_evaluate_of_the_base_gives_the_loss_before_training(run):
    assert evaluated_loss("--model", "hf") > 1.5 * metrics(run)[-1]["eval_loss"]


@pytest.mark.parametrize("more", [["--data.packing"], ["--batch_size", 2]])
def test_the_loss_does_not_depend_on_rows(more):
    assert evaluated_loss("--model", "hf", *more) == pytest.approx(
        evaluated_loss("--model", "hf"), abs=5e-6
    )


def test_the_loss_does_not_depend_on_the_mesh(run):
    flags = ("--model", "hf", "--adapter", "run", "--base_dtype", "int8")
    mesh = ("--mesh.fsdp", 2, "--mesh.tensor", 2, "--mesh.context", 2)
    assert evaluated_loss(*flags, *mesh) == pytest.approx(
        evaluated_loss(*flags), abs=5e-6
    )


def test_a_mesh_that_is_chosen_is_for_training_only():
    flags = ("--model", "hf", "--data", "eval.jsonl", "--mesh.auto")
    assert call("evaluate", *flags).status == 2


def test_evaluate_prints_loss_perplexity_and_tokens():
    out = succeed(
        "evaluate", "--model", "hf", "--data", "eval.jsonl", "--data.seq_len", 64
    )
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
    monkeypatch.setattr("jlora.loading.load_params", pytest.fail)
    out = succeed(
        "evaluate",
        "--model",
        "hf",
        "--data",
        "chat.jsonl",
        "--show",
        "--data.seq_len",
        64,
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


def test_several_adapters_are_compared_with_the_base_in_one_table(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    flags = ["--model", "hf", "--data", "eval.jsonl", "--data.seq_len", 64]
    several = ["--adapters", "run", "--adapters", tmp_path / "copy"]
    out = succeed("evaluate", *flags, *several, "--generate", 3, "--max_new_tokens", 12)
    head, *rows = out.splitlines()
    names = [
        "adapter",
        "loss",
        "perplexity",
        "tokens",
        "exact match",
        "chrF",
        "answers",
    ]
    assert re.split(r"  +", head) == names
    cells = [re.split(r"  +", row) for row in rows]
    assert [row[0] for row in cells] == ["run", str(tmp_path / "copy"), "base"]
    assert cells[0][1:] == cells[1][1:]
    for name, row in (("run", cells[0]), (None, cells[2])):
        adapter = [] if name is None else ["--adapter", name]
        assert float(row[1]) == evaluated_loss("--model", "hf", *adapter)
    assert float(cells[0][4]) > float(cells[2][4]) == 0
    assert float(cells[0][5]) > float(cells[2][5])


def test_answers_are_written_beside_their_references(run, tmp_path):
    flags = ["--model", "hf", "--adapter", "run", "--data", "eval.jsonl"]
    flags += [
        "--data.seq_len",
        64,
        "--generate",
        2,
        "--answers",
        tmp_path / "answers.jsonl",
    ]
    printed = dict(x.split(": ") for x in succeed("evaluate", *flags).split(" || "))
    assert float(printed["loss"]) == evaluated_loss(*flags[:4])
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [(row["prompt"], row["reference"]) for row in found] == [
        (f"What is {letter}?", f" It is {letter}.") for letter in "ac"
    ]
    answers = [row["answers"]["run"] for row in found]
    for row, answer in zip(found, answers, strict=True):
        done = call("generate", *flags[:4], "--prompt", row["prompt"])
        assert done.out == f"{answer}\n"
    same = [a == row["reference"] for a, row in zip(answers, found, strict=True)]
    assert float(printed["exact match"]) == sum(same) / 2 > 0
    references = [row["reference"].strip() for row in found]
    texts = [answer.strip() for answer in answers]
    score = sacrebleu.corpus_chrf(texts, [references]).score
    assert float(printed["chrF"]) == pytest.approx(score, abs=0.005)


def test_the_last_answer_of_a_conversation_is_the_reference(tmp_path):
    talk = chat("Add two.", "The sum is five.", "And now?", "It is done.")
    write_rows(tmp_path / "talk.jsonl", [talk])
    flags = ["--model", "hf", "--data", tmp_path / "talk.jsonl", "--generate", 1]
    flags += ["--max_new_tokens", 4, "--answers", tmp_path / "answers.jsonl"]
    succeed("evaluate", *flags)
    found = json.loads((tmp_path / "answers.jsonl").read_text())
    assert found["reference"].strip() == "It is done."
    assert found["prompt"].index("The sum is five.") < found["prompt"].index("And now?")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter", "a", "--adapters", "b"], "give --adapter, or --adapters with"),
        (["--answers", "a"], "--answers has no effect without --generate"),
        (
            ["--generate", 1, "--answers", "no/a.jsonl"],
            "answers=no/a.jsonl: there is no",
        ),
        (["--generate", 1, "--answers", "."], "answers=.: cannot be written"),
        (["--generate", -1], "generate=-1; expected at least 0"),
        (
            ["--generate", 1, "--data.format", "text"],
            "no record has a prompt and an answer",
        ),
    ],
)
def test_mistakes_of_comparing_are_named(flags, message, tmp_path):
    write_rows(tmp_path / "text.jsonl", [{"text": "the sum is five"}])
    done = call("evaluate", "--model", "hf", "--data", tmp_path / "text.jsonl", *flags)
    assert (done.status, message in done.err) == (2, True), done.err
