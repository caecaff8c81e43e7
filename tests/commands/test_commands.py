import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.numpy
import yaml
from helpers import ROOT
from helpers.commands import (
    PER_STEP,
    STEPS,
    Done,
    adapter_bytes,
    call,
    metrics,
    succeed,
    training,
)
from helpers.data_cases import write_rows

from jlora.train.resuming import locked


@pytest.fixture(scope="module")
def merged(place, run) -> Path:
    out = place / "merged"
    succeed("convert.to_hf", "--model", place / "hf", "--adapter", run, out)
    return out


def loss_of(*words: object) -> float:
    line = succeed("evaluate", "--data", "eval.jsonl", "--seq_len", 64, *words)
    return float(line.split()[1])


pytestmark = pytest.mark.usefixtures("compiled", "inside")

# The main job, end to end.


def test_training_lowers_the_loss(run):
    losses = [line["loss"] for line in metrics(run) if "loss" in line]
    assert losses[-1] < 0.6 * losses[0]


def test_the_first_line_is_pefts_report_of_trainable_parameters(run):
    first = (run / "out").read_text().splitlines()[0]
    assert first == (
        "trainable params: 7,424 || all params: 48,544 || trainable%: 15.2933"
    )


def test_each_step_has_one_line_of_metrics_with_every_key(run):
    lines = [line for line in metrics(run) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line.keys() >= PER_STEP for line in lines)


def test_held_out_data_is_evaluated_every_so_often_and_at_the_end(run):
    lines = [line for line in metrics(run) if "eval_loss" in line]
    assert [line["step"] for line in lines] == [20, STEPS]
    assert lines[1]["eval_loss"] < lines[0]["eval_loss"]


def test_a_run_folder_holds_what_the_design_says(run):
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "adapter"} <= names
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in (run / "checkpoints").iterdir()] == [str(STEPS)]


def test_evaluate_gives_the_loss_that_the_run_saw_last(run):
    last = metrics(run)[-1]["eval_loss"]
    # One device here, eight there: sums in another order, and six decimals printed.
    assert loss_of("--model", "hf", "--adapter", "run") == pytest.approx(last, abs=5e-6)


def test_evaluate_of_the_base_gives_the_loss_before_training(run, place):
    base_loss = loss_of("--model", "hf")
    assert base_loss > 1.5 * metrics(run)[-1]["eval_loss"]


@pytest.mark.parametrize("more", [["--packing"], ["--batch_size", 2]])
def test_the_loss_does_not_depend_on_rows(more):
    assert loss_of("--model", "hf", *more) == pytest.approx(
        loss_of("--model", "hf"), abs=5e-6
    )


def test_evaluate_prints_loss_perplexity_and_tokens():
    out = succeed("evaluate", "--model", "hf", "--data", "eval.jsonl", "--seq_len", 64)
    loss, perplexity, tokens = (part.split(": ")[1] for part in out.split(" || "))
    assert float(perplexity) == pytest.approx(np.exp(float(loss)), rel=1e-5)
    # " It is a." has 6 tokens, with c and e 7 each ("Ġa" is one token); and 3 ends.
    assert int(tokens) == 6 + 7 + 7 + 3


def test_the_merged_folder_gives_the_loss_of_base_and_adapter(merged):
    assert loss_of("--model", merged) == pytest.approx(
        loss_of("--model", "hf", "--adapter", "run"), abs=2e-6
    )


def test_the_peft_folder_holds_the_runs_adapter(run, tmp_path):
    succeed("convert.to_peft", "--adapter", run, tmp_path / "peft")
    exported = safetensors.numpy.load_file(
        tmp_path / "peft" / "adapter_model.safetensors"
    )
    trained = safetensors.numpy.load(adapter_bytes(run))
    assert exported.keys() == trained.keys()
    assert all(np.array_equal(exported[key], trained[key]) for key in trained)


def test_exports_are_the_same_bytes_twice(run, merged, tmp_path):
    again = tmp_path / "merged"
    succeed("convert.to_hf", "--model", "hf", "--adapter", run, again)
    files = sorted(path.name for path in merged.iterdir())
    assert files == sorted(path.name for path in again.iterdir())
    assert all((merged / f).read_bytes() == (again / f).read_bytes() for f in files)


def test_generate_continues_a_prompt(run):
    words = ["--model", "hf", "--prompt", "What is", "--max_new_tokens", 4]
    out = succeed("generate", *words)
    assert out.endswith("\n")
    assert out == succeed("generate", *words)
    assert out != succeed("generate", *words, "--adapter", "run")


def test_merged_and_adapted_models_generate_the_same(merged):
    words = ["--prompt", "What is a", "--max_new_tokens", 8]
    assert succeed("generate", "--model", merged, *words) == succeed(
        "generate", "--model", "hf", "--adapter", "run", *words
    )


def test_sampling_follows_the_seed():
    words = ["--model", "hf", "--prompt", "What", "--max_new_tokens", 8]
    first, again, other = (
        succeed("generate", *words, "--temperature", 2.0, "--seed", seed)
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_chat_answers_the_prompt_and_stops():
    words = ["--model", "hf", "--chat", "--prompt", "What is a?"]
    assert succeed("generate", *words, "--max_new_tokens", 4).endswith("\n")


def test_chat_reads_messages_until_an_empty_line(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What?\nAnd?\n\nNever read\n"))
    out = succeed("generate", "--model", "hf", "--chat", "--max_new_tokens", 2)
    assert out.count("\n") >= 2


def test_messages_are_trained_on_too(tmp_path):
    run = tmp_path / "run"
    words = training(run, "--data.train", "chat.jsonl", "--train.max_steps", 2)
    assert "every assistant turn" in succeed("train", *words)
    assert len(metrics(run)) == 2


def test_packed_training_runs(tmp_path):
    words = training(tmp_path / "run", "--data.packing", "--train.max_steps", 2)
    assert "packed" in succeed("train", *words)


# What a model may be.


def test_a_folder_and_the_base_made_of_it_train_the_same(run, base, tmp_path):
    words = training(tmp_path / "run", "--model", base)
    succeed("train", *words)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(run)


@pytest.mark.parametrize(
    "more",
    [
        ("--lora.use_dora", "--lora.modules_to_save", "[lm_head,norm]"),
        (
            "--lora.init_lora_weights",
            "olora",
            "--lora.trainable_token_indices",
            "[3,5]",
        ),
    ],
    ids=["dora", "olora"],
)
def test_every_kind_of_adapter_trains_resumes_and_merges(more, tmp_path):
    steps = 4
    words = training(tmp_path / "run", "--data.eval", "eval.jsonl", *more)
    with_steps = [*words, "--train.max_steps", steps, "--train.save_every", 1]
    succeed("train", *with_steps)
    logged = metrics(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")  # as a run that was killed
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(steps))
    adapter = ("--adapter", tmp_path / "run")
    succeed("convert.to_hf", "--model", "hf", *adapter, tmp_path / "early")
    succeed("train", *with_steps)
    assert metrics(tmp_path / "run")[-1]["eval_loss"] == logged[-1]["eval_loss"]
    succeed("convert.to_hf", "--model", "hf", *adapter, tmp_path / "merged")
    for model in (("--model", tmp_path / "merged"), ("--model", "hf", *adapter)):
        assert loss_of(*model) == pytest.approx(logged[-1]["eval_loss"], abs=2e-5)


def test_a_quantised_model_trains_resumes_and_merges(tmp_path):
    base, run, merged = (tmp_path / name for name in ("nf4", "run", "merged"))
    facts = succeed("convert.from_hf", "hf", base, "--quantize", "nf4")
    assert "nf4: the layers' projections" in facts
    nf4 = ["--compute.base_dtype", "nf4", "--train.max_steps"]
    first = succeed("train", *training(run, *nf4, 2))
    assert "all params: 48,544" in first  # 41,120 of the base, as unquantised
    # The same weights, quantised before: the run goes on.
    resumed = succeed("train", *training(run, *nf4, 3, "--model", base))
    assert "resuming after step 2" in resumed
    words = ["--model", base, "--adapter", run]
    assert "all as written" in succeed("convert.to_hf", *words, merged)
    assert loss_of(*words) == pytest.approx(loss_of("--model", merged), abs=2e-6)
    text = ["--prompt", "What is", "--max_new_tokens", 4]
    assert succeed("generate", *words, *text) == succeed(
        "generate", "--model", merged, *text
    )


def test_info_tells_what_a_base_is(base):
    out = succeed("convert.info", base)
    assert "2 layers of 32" in out
    assert "content digest" in out


def test_converting_twice_gives_the_same_digest(base, tmp_path):
    out = succeed("convert.from_hf", "hf", tmp_path / "again")
    digest = next(line for line in out.splitlines() if "digest" in line)
    assert digest in succeed("convert.info", base)


# Settings.


def test_the_runs_config_file_gives_the_same_run_again(run, tmp_path):
    again = tmp_path / "again"
    succeed("train", "--config", run / "config.yaml", "--output_dir", again)
    assert adapter_bytes(again) == adapter_bytes(run)
    keys = ("step", "loss", "grad_norm", "eval_loss")
    first, second = (
        [[line.get(key) for key in keys] for line in metrics(folder)]
        for folder in (run, again)
    )
    assert first == second


def test_the_config_file_holds_every_group_and_no_python_types(run):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    groups = {"data", "lora", "optim", "train", "mesh", "compute"}
    assert groups | {"model", "output_dir", "seed"} <= settings.keys()
    assert settings["lora"]["target_modules"] == "all-linear"


def test_a_seed_changes_the_run(run, tmp_path):
    succeed("train", *training(tmp_path / "run", "--seed", 1))
    assert adapter_bytes(tmp_path / "run") != adapter_bytes(run)


def test_accumulation_gives_the_same_losses(run, tmp_path):
    words = training(
        *(tmp_path / "run", "--train.batch_size", 16, "--train.grad_accum_steps", 2),
        *("--train.max_steps", 2),
    )
    whole = training(
        tmp_path / "whole", "--train.batch_size", 16, "--train.max_steps", 2
    )
    succeed("train", *words)
    succeed("train", *whole)
    parts, full = (
        [line["loss"] for line in metrics(tmp_path / name)] for name in ("run", "whole")
    )
    assert parts == pytest.approx(full, rel=1e-6)


def test_plan_reads_no_weights_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("train.load_params", pytest.fail)
    out = succeed("train", *training(tmp_path / "run", "--plan"))
    assert out.startswith("trainable params: 7,424")
    for words in (
        "activations",
        "tokens per record",
        "What is a?{+ It is a.<|im_end|>+}",
    ):
        assert words in out
    assert not (tmp_path / "run").exists()


def test_plan_continues_an_adapter(run, tmp_path):
    words = training(tmp_path / "new", "--plan", "--init_adapter", run)
    assert succeed("train", *words).startswith("trainable params: 7,424")


def test_evaluate_shows_what_would_be_read(monkeypatch):
    monkeypatch.setattr("evaluate.load_params", pytest.fail)
    out = succeed(
        "evaluate", "--model", "hf", "--data", "chat.jsonl", "--show", "--seq_len", 64
    )
    assert "{+The sum is five.<|im_end|>+}" in out


def test_an_adapter_is_continued(run, tmp_path):
    words = training(tmp_path / "run", "--init_adapter", run, "--train.max_steps", 1)
    out = succeed("train", *words)
    assert out.startswith("trainable params: 7,424")
    first = metrics(tmp_path / "run")[0]["loss"]
    last = [line["loss"] for line in metrics(run) if "loss" in line][-1]
    assert first <= last * 1.01


def test_a_continued_adapter_keeps_its_own_settings(run, tmp_path):
    words = [
        *("--model", "hf", "--output_dir", tmp_path / "run", "--data.seq_len", 64),
        *("--data.train", "train.jsonl", "--init_adapter", run / "adapter"),
        *("--train.max_steps", 1, "--lora.r", 2, "--lora.lora_dropout", 0.5),
    ]
    succeed("train", *words)
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["lora"]
    assert settings["r"] == 8
    assert settings["lora_dropout"] == 0.5


# Runs that end early, and go on.


def in_a_process(compiled: dict[str, str], *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **compiled},
    )


def send(process: subprocess.Popen[str], signal_number: int, after: int) -> Done:
    """Sends a signal as soon as step `after` is logged; returns how it ended."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(f"step {after}/"):
            process.send_signal(signal_number)
            break
    out, err = process.communicate(timeout=60)
    return Done(process.returncode, "".join(lines) + out, err)


class Interrupted(NamedTuple):
    killed: Done
    stopped: Done
    resumed: Done
    folder: Path
    whole: Path


@pytest.fixture(scope="module")
def interrupted(place, compiled) -> Interrupted:
    """A run killed, resumed, asked to stop and resumed, beside an uninterrupted one."""
    steps = 200
    with contextlib.chdir(place):
        words = [*training("cut"), "--train.save_every", 10, "--train.max_steps", steps]
        killed = send(in_a_process(compiled, *words), signal.SIGKILL, after=15)
        stopped = send(in_a_process(compiled, *words), signal.SIGTERM, after=25)
        resumed = call("train", *words)
        whole = [place / "whole" if word == "cut" else word for word in words]
        succeed("train", *whole)
    return Interrupted(killed, stopped, resumed, place / "cut", place / "whole")


def test_a_killed_run_goes_on_from_its_newest_checkpoint(interrupted):
    assert interrupted.killed.status == -signal.SIGKILL
    after = next(
        int(line.split()[-1])
        for line in interrupted.stopped.out.splitlines()
        if line.startswith("resuming after step")
    )
    assert after >= 10
    assert after % 10 == 0


def test_a_run_asked_to_stop_saves_and_exits_with_75(interrupted):
    status, _, err = interrupted.stopped
    assert status == 75
    assert err.startswith("stopped: step ")
    step = int(err.split()[2])
    assert f"resuming after step {step}\n" in interrupted.resumed.out


def test_an_interrupted_run_ends_with_the_bytes_of_an_uninterrupted_one(interrupted):
    assert interrupted.resumed.status == 0
    assert adapter_bytes(interrupted.folder) == adapter_bytes(interrupted.whole)


def test_an_interrupted_run_has_the_metrics_of_an_uninterrupted_one(interrupted):
    losses, whole = (
        [(line["step"], line["loss"]) for line in metrics(folder)]
        for folder in (interrupted.folder, interrupted.whole)
    )
    assert losses == whole


def test_only_the_checkpoints_asked_for_are_kept(interrupted):
    names = {path.name for path in (interrupted.whole / "checkpoints").iterdir()}
    assert names == {"190", "200"}


def test_a_finished_run_started_again_changes_nothing(interrupted):
    words = [*training("whole"), "--train.save_every", 10, "--train.max_steps", 200]
    before = metrics(interrupted.whole), adapter_bytes(interrupted.whole)
    assert "resuming after step 200" in succeed("train", *words)
    assert (metrics(interrupted.whole), adapter_bytes(interrupted.whole)) == before


def test_a_run_with_more_steps_than_asked_for_is_refused_untouched(interrupted):
    before = (interrupted.whole / "config.yaml").read_text()
    done = call("train", *training("whole"), "--train.max_steps", 100)
    assert done.status == 2
    assert "at step 200 already" in done.err
    assert (interrupted.whole / "config.yaml").read_text() == before


def test_a_resumed_run_tells_which_settings_changed(interrupted):
    words = [*training("cut"), "--train.max_steps", 201, "--optim.adam_b2", 0.99]
    out = succeed("train", *words)
    assert "note: optim.adam_b2 is 0.99, was 0.999\n" in out
    assert "note: train.max_steps is 201, was 200\n" in out
    assert "note: model" not in out


def test_a_run_that_goes_on_and_is_stopped_has_no_adapter_of_before(
    interrupted, compiled, place
):
    folder = place / "longer"
    shutil.copytree(interrupted.whole, folder)
    words = [*training("longer"), "--train.save_every", 10, "--train.max_steps", 4000]
    with contextlib.chdir(place):
        done = send(in_a_process(compiled, *words), signal.SIGTERM, after=201)
    assert done.status == 75
    assert not (folder / "adapter").exists()


def test_a_stop_asked_for_while_the_weights_are_read_is_heeded(
    compiled, place, tmp_path
):
    words = training(tmp_path / "early", "--train.max_steps", 4000)
    with contextlib.chdir(place):
        process = in_a_process(compiled, *words)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("trainable params")
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert err == "stopped: step 1 is saved; run it again to go on\n"


def test_the_last_step_is_logged_however_rare_the_lines_are(tmp_path):
    words = training(tmp_path / "run", "--train.max_steps", 2, "--train.log_every", 10)
    succeed("train", *words)
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [2]
    assert (tmp_path / "run" / "report.png").exists()


def test_without_a_length_rows_are_as_long_as_the_model_allows(tmp_path):
    words = training(tmp_path / "run")
    at = words.index("--data.seq_len")
    out = succeed("train", *words[:at], *words[at + 2 :], "--plan")
    assert "x 128 tokens" in out or "rows" in out
    succeed("evaluate", "--model", "hf", "--data", "eval.jsonl")
    succeed("generate", "--model", "hf", "--prompt", "a")


def test_a_plan_says_whether_it_fits(run, tmp_path):
    fits = succeed("train", *training(tmp_path / "run", "--plan"))
    assert "GiB: fits\n" in fits
    words = training(tmp_path / "run", "--plan", "--train.batch_size", 8 * 10**7)
    assert "GiB: does not fit; use fewer rows" in succeed("train", *words)


def test_a_run_without_its_adapter_folder_is_read_from_its_checkpoint(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    assert loss_of("--model", "hf", "--adapter", tmp_path / "run") == loss_of(
        "--model", "hf", "--adapter", run
    )


def test_resume_never_refuses_a_folder_with_a_run(run):
    done = call("train", *training(run, "--resume", "never"))
    assert done.status == 2
    assert "holds a run already" in done.err


def test_resume_must_refuses_a_folder_without_a_run(tmp_path):
    done = call("train", *training(tmp_path / "new", "--resume", "must"))
    assert done.status == 2
    assert "no checkpoint to resume from" in done.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lora.r", 4], "lora.r is 4, was 8"),
        (["--seed", 1], "seed is 1, was 0"),
        (["--train.batch_size", 16], "batch_size is 16, was 8"),
        (["--data.train", "eval.jsonl"], "the data differs"),
        (["--data.packing", "true"], "data.packing is true, was false"),
        (["--data.seq_len", 32], "data.seq_len is 32, was 64"),
        (["--compute.base_dtype", "bfloat16"], "the base differs"),
    ],
)
def test_a_run_goes_on_with_what_it_began_with_only(run, more, said):
    done = call("train", *training(run, *more))
    assert done.status == 2
    assert said in done.err
    assert len(done.err) < 300


@pytest.mark.parametrize("steps", [4, STEPS])
def test_training_that_diverges_ends_with_6(steps, tmp_path):
    words = training(
        tmp_path / "run", "--optim.learning_rate", 1e38, "--optim.warmup_ratio", 0
    )
    done = call("train", *words, "--train.max_steps", steps)
    assert done.status == 6
    assert "Lower optim.learning_rate" in done.err
    assert not (tmp_path / "run" / "adapter").exists()
    broken = [line for line in metrics(tmp_path / "run") if line.get("non_finite")]
    assert broken[0]["loss"] is None


# Mistakes: one message that says what to do, and the right status.


@pytest.fixture(scope="module")
def mistakes(place, run, base) -> None:
    """Files that a test of a mistake names."""
    (place / "empty").mkdir()
    (place / "full").mkdir()
    (place / "full" / "thesis.txt").write_text("years of work")
    (place / "new_run" / "checkpoints").mkdir(parents=True)
    (place / "qwen").mkdir()
    qwen = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    (place / "qwen" / "config.json").write_text(json.dumps(qwen))
    shutil.copytree(place / "hf", place / "cut_off")
    with (place / "cut_off" / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    good = {"prompt": "a", "completion": "b"}
    write_rows(place / "broken.jsonl", [good, '{"prompt": "a", "completion": }', good])
    write_rows(place / "keys.jsonl", [good, {"prompt": "a", "complet": "b"}])
    write_rows(place / "nothing.jsonl", [])
    (place / "bad.yaml").write_text('lora:\n  r: "8"\n')


TRAIN_MISTAKES = [
    ("", 2, "missing: --model"),
    ("--model hf --output_dir r", 2, "--data.train is missing; give"),
    ("{} --data.trian x", 2, "did you mean --data.train?"),
    ("{} --config bad.yaml", 2, "bad.yaml: lora.r is the text '8'"),
    ("{} --config no.yaml", 2, "no.yaml: cannot be read"),
    ("{} --lora.r 0", 2, "r=0"),
    ("{} --lora.r eight", 2, "--lora.r is 'eight'; expected an integer"),
    ("{} --lora.lora_alpha 0", 2, "lora_alpha=0.0"),
    ("{} --lora.lora_dropout 1.0", 2, "lora_dropout=1.0"),
    ("{} --lora.target_modules [q_porj]", 2, "did you mean 'q_proj'?"),
    ("{} --lora.target_modules q_proj", 2, "write [q_proj]"),
    ("{} --lora.target_modules q_proj,v_proj", 2, "write [q_proj,v_proj]"),
    ("{} --lora.target_modules (", 2, "not a regular expression"),
    ("{} --lora.lora_bias true", 3, "lora_bias=True (jlora has no bias on lora_B)"),
    ("{} --lora.layer_replication [[0,2]]", 3, "layer_replication=[[0, 2]]"),
    (
        "{} --lora.target_modules [q_proj] --lora.layers_to_transform [1,99]",
        2,
        "layers_to_transform: 99",
    ),
    ("{} --lora.bias all", 3, "lora.bias='all'"),
    ("{} --lora.init_lora_weights eva", 3, "init_lora_weights='eva'"),
    ("{} --lora.modules_to_save [lm_haed]", 2, "did you mean 'lm_head'?"),
    ("{} --lora.trainable_token_indices [1,1]", 2, "1 is given twice"),
    ("{} --lora.ensure_weight_tying", 2, "leave it out"),
    ("{} --compute.attention cudnn", 2, "needs an NVIDIA GPU"),
    ("{} --data.format alpaka", 2, "expected one of auto, text"),
    ("{} --data.train missing.jsonl", 2, "missing.jsonl: no such file"),
    ("{} --data.train empty", 2, "empty is a folder"),
    ("{} --data.train nothing.jsonl", 2, "no records"),
    ("{} --data.train broken.jsonl", 4, "line 2, column 31: not JSON"),
    ("{} --data.train keys.jsonl", 4, "line 2: no completion"),
    ("{} --data.eval missing.jsonl", 2, "missing.jsonl: no such file"),
    ("{} --data.train_on assistant", 2, "choose auto, completion, all"),
    ("{} --data.seq_len 129", 2, "data.seq_len=129 exceeds"),
    ("{} --data.seq_len 1", 2, "data.seq_len=1; expected at least 2"),
    ("{} --train.batch_size 12", 2, "does not divide"),
    ("{} --train.batch_size 8 --train.grad_accum_steps 3", 2, "not a multiple"),
    ("{} --mesh.data 3", 2, "8"),
    ("{} --mesh.data 1 --mesh.tensor 8", 2, "num_key_value_heads=2"),
    ("{} --seed -1", 2, "seed=-1"),
    ("{} --seed 4294967296", 2, "seed=4294967296; expected"),
    ("{} --lora.r 1000000000000", 2, "r=1000000000000; expected"),
    ("{} --lora.target_modules []", 2, "target_modules=[] is empty"),
    ("{} --train.num_epochs 0 --train.max_steps 0", 2, "num_epochs=0"),
    ("{} --resume sometimes", 2, "expected one of auto, never, must"),
    ("{} --model nowhere", 2, "nowhere: no such file or folder"),
    ("{} --model empty", 2, "empty: holds no config.json"),
    ("{} --model train.jsonl", 2, "not a model folder"),
    ("{} --model qwen", 3, "Qwen2ForCausalLM"),
    ("{} --model cut_off", 4, "model.safetensors"),
    ("{} --output_dir hf", 2, "hf: holds a model"),
    ("{} --output_dir train.jsonl", 2, "train.jsonl: exists and is not a folder"),
    ("{} --output_dir /dev/null/run", 2, "/dev/null/run: "),
    ("{} --init_adapter empty", 2, "neither adapter_config.json"),
    ("{} --init_adapter nowhere", 2, "nowhere: no such folder"),
    ("{} --init_adapter new_run", 2, "nor a checkpoint"),
]
GENERATE_MISTAKES = [
    ("", 2, "missing: --model"),
    ("--model hf", 2, "give --prompt TEXT, or --chat"),
    ("--model hf --prompt=", 2, "the prompt is empty"),
    ("--model hf --prompt a --max_new_tokens 0", 2, "max_new_tokens=0"),
    ("--model hf --prompt a --max_new_tokens 128", 2, "at most max_new_tokens=127"),
    ("--model hf --prompt " + "a" * 200, 2, "shorten it"),
    ("--model hf --prompt a --temperature -1", 2, "temperature=-1.0"),
    ("--model hf --prompt a --seed 4294967296", 2, "seed=4294967296; expected"),
    ("--model hf --prompt a --adapter empty", 2, "neither adapter_config.json"),
    ("--model hf --prompt a --adapter hf", 2, "neither adapter_config.json"),
    ("--model nowhere --prompt a", 2, "no such file or folder"),
]
EVALUATE_MISTAKES = [
    ("--model hf", 2, "missing: --data"),
    ("--model hf --data eval.jsonl --seq_len 512", 2, "seq_len=512 exceeds"),
    ("--model hf --data eval.jsonl --batch_size 0", 2, "batch_size=0"),
    ("--model hf --data eval.jsonl --seq_len 0", 2, "seq_len=0"),
    ("--model hf --data broken.jsonl --seq_len 64", 4, "line 2, column 31"),
    ("--model hf --data eval.jsonl --seq_len 64 --adapter new_run", 2, "checkpoint"),
]
CONVERT_MISTAKES = [
    ("from_hf", "", 2, "missing: SRC"),
    ("from_hf", "hf", 2, "missing: OUT"),
    ("from_hf", "hf base", 2, "add --overwrite"),
    ("from_hf", "hf full --overwrite", 2, "choose another OUT"),
    ("from_hf", "hf hf --overwrite", 2, "is or holds the source"),
    ("from_hf", "hf /dev/null/x", 2, "/dev/null"),
    ("from_hf", "hf x --overwrit", 2, "did you mean --overwrite?"),
    ("from_hf", "hf x y", 2, "unexpected: y"),
    ("from_hf", "hf x --dtype bf16", 2, "did you mean 'bfloat16'?"),
    ("from_hf", "hf x --quantize nf3", 2, "expected one of none, fp8, int8, nf4"),
    ("from_hf", "qwen x", 3, "Qwen2ForCausalLM"),
    ("from_hf", "cut_off x", 4, "model.safetensors"),
    ("info", "nowhere", 2, "no such file or folder"),
    ("to_hf", "x --model hf", 2, "missing: --adapter"),
    ("to_hf", "x --model hf --adapter empty", 2, "neither adapter_config.json"),
    ("to_hf", "base --model hf --adapter run", 2, "add --overwrite"),
    ("to_peft", "x --adapter hf", 2, "neither adapter_config.json"),
    ("to_peft", "x --adapter run --for vlm", 2, "--for is 'vlm'; expected one of"),
]
MISTAKES = [
    *(("train", *mistake) for mistake in TRAIN_MISTAKES),
    *(("generate", *mistake) for mistake in GENERATE_MISTAKES),
    *(("evaluate", *mistake) for mistake in EVALUATE_MISTAKES),
    *((f"convert.{name}", *mistake) for name, *mistake in CONVERT_MISTAKES),
]


@pytest.mark.usefixtures("mistakes")
@pytest.mark.parametrize(
    ("command", "words", "status", "said"),
    MISTAKES,
    ids=[f"{name} {words[:60]}" for name, words, *_ in MISTAKES],
)
def test_a_mistake_is_one_message_and_its_status(command, words, status, said, place):
    given = words.split()
    if "{}" in given:
        given = [*training("new"), *given[1:]]
    done = call(command, *given)
    assert (done.status, said in done.err) == (status, True), done.err
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    assert not (place / "x").exists()
    assert not (place / "new" / "checkpoints").exists()


def test_a_run_folder_in_use_is_refused(tmp_path):
    with locked(tmp_path / "run"):
        done = call("train", *training(tmp_path / "run"))
    assert done.status == 2
    assert "another run is using this folder" in done.err


def test_a_folder_that_may_not_be_written_is_told(tmp_path, monkeypatch):
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    done = call("train", *training(tmp_path / "run"))
    assert done.status == 2
    assert "cannot be written (Permission denied)" in done.err


# Purity.

PURITY = """
import importlib, pkgutil, runpy, sys

def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        raise SystemExit(f"opened a socket: {event} {args}")

sys.addaudithook(refuse)
import convert, jlora, train, generate, evaluate
from jlora.cli.command import run_command
for package in (convert, jlora):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
for module, words in (
    (train, sys.argv[1:]),
    (evaluate, "--model hf --data eval.jsonl --seq_len 64 --adapter pure".split()),
    (generate, "--model hf --prompt a --max_new_tokens 4 --adapter pure".split()),
):
    assert run_command(module.main, module.Arguments, argv=words) == 0
heavy = {"torch", "tensorflow", "transformers", "datasets", "peft", "huggingface_hub"}
print("loaded:", sorted(heavy & {name.split(".")[0] for name in sys.modules}))
"""


def test_local_paths_open_no_socket_and_load_no_other_framework(compiled, place):
    words = training("pure", "--train.max_steps", 2, "--data.eval", "eval.jsonl")
    done = subprocess.run(
        [sys.executable, "-c", PURITY, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, **compiled, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"


IN_TIME = """
import importlib, sys
import jax
from jlora.cli.command import run_command

def keep_freed_memory():
    jax.config.update("jax_num_cpu_devices", 1)  # an error once there are devices
    raise SystemExit("in time")

module = importlib.import_module(sys.argv[1])
module.keep_freed_memory = keep_freed_memory
run_command(module.main, module.Arguments, argv=sys.argv[2:])
"""


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_memory_is_kept_before_any_use_of_a_device(place, name):
    words = {
        "train": training("never"),
        "evaluate": ["--model", "hf", "--data", "eval.jsonl", "--seq_len", 64],
    }
    done = subprocess.run(
        [sys.executable, "-c", IN_TIME, name, *map(str, words[name])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.stderr.splitlines()[-1:] == ["in time"]


def test_a_command_is_a_program(place):
    done = subprocess.run(
        [sys.executable, "-m", "convert.info", "nowhere"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: nowhere: no such file or folder")
    assert done.stderr.count("\n") == 1
