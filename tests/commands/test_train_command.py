import contextlib
import json
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.commands import (
    STEPS,
    adapter_bytes,
    call,
    evaluated_loss,
    generated,
    losses,
    metrics,
    succeed,
    train_flags,
)

from jlora.train import device_model
from jlora.train.resuming import locked
from jlora.train.run import Run

pytestmark = pytest.mark.usefixtures("in_workdir")

PER_STEP = {
    *("step", "epoch", "loss", "learning_rate", "grad_norm"),
    *("tokens", "supervised_tokens", "tokens_per_second"),
    *("step_loss", "step_time_s", "data_wait_s", "mfu", "peak_memory_bytes"),
}


def test_training_lowers_the_loss(run):
    assert losses(run)[-1] < 0.6 * losses(run)[0]


def test_the_first_line_is_pefts_report_of_trainable_parameters(run):
    first = (run / "out").read_text().splitlines()[0]
    assert first == (
        "trainable params: 7,424 || all params: 48,544 || trainable%: 15.2933"
    )


def test_each_step_has_one_line_of_metrics_with_every_key(run):
    lines = [line for line in metrics(run) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line.keys() >= PER_STEP for line in lines)


def test_held_out_data_is_evaluated_at_the_start_every_so_often_and_at_the_end(run):
    lines = [line for line in metrics(run) if "eval_loss" in line]
    assert [line["step"] for line in lines] == [0, 20, STEPS]
    assert lines[2]["eval_loss"] < lines[1]["eval_loss"] < lines[0]["eval_loss"]
    assert lines[0]["eval_loss"] == pytest.approx(
        evaluated_loss("--model", "hf"), abs=1e-6
    )


def test_the_first_evaluation_can_be_left_out(tmp_path):
    flags = train_flags(tmp_path / "run", "--train.max_steps", 1)
    more = ("--data.eval", "eval.jsonl", "--train.eval_at_start", "false")
    out = succeed("train", *flags, *more)
    assert [m["step"] for m in metrics(tmp_path / "run") if "eval_loss" in m] == [1]
    assert out.index("compiling the train step") < out.index("compiling the evaluation")


def test_the_last_lines_say_what_came_out_and_which_commands_use_it(run, tmp_path):
    *_, done, best, tried, evaluated, exported = (run / "out").read_text().splitlines()
    assert re.match(r"done in .* \(compiling .* evaluating .* training .*\)$", done)
    loss = metrics(run)[-1]["eval_loss"]
    before = metrics(run)[0]["eval_loss"]
    assert best == (
        f"best eval_loss {loss:.4f} at step {STEPS} ({before:.4f} before the first step)"
    )
    words = [shlex.split(line.partition(": ")[2]) for line in (tried, evaluated)]
    assert words[0] == [
        *("python", "generate.py", "--model", "hf", "--adapter", "run"),
        *("--prompt", "What is a?"),
    ]
    assert words[1][:2] == ["python", "evaluate.py"]
    printed = succeed("evaluate", *words[1][2:])
    assert float(printed.split()[1]) == pytest.approx(loss, abs=2e-5)
    assert exported == "export:   python -m convert.to_hf run run-merged"


def test_a_run_folder_holds_what_the_design_says(run):
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "adapter"} <= names
    page = (run / "report.html").read_text("utf-8")
    for text in ("trainable params: 7,424", "What is a?", "best ", "target_modules:"):
        assert text in page
    assert f"--config {run.name}/config.yaml --output_dir {run.name}-again" in page
    assert [p.name for p in (run / "checkpoints").iterdir()] == [str(STEPS)]


BEST = (
    *("--data.eval", "eval.jsonl", "--optim.learning_rate", 0.3, "--train.keep", 1),
    *("--optim.lr_schedule", "constant", "--train.save_every", 7, "--train.keep_best"),
    *("--train.eval_every", 2, "--train.early_stopping_patience", 3),
)


@pytest.fixture(scope="module")
def best(workdir) -> tuple[Path, str]:
    """A run that ends early, and what it printed."""
    with contextlib.chdir(workdir):
        return workdir / "best", succeed("train", *train_flags("best", *BEST))


def test_a_run_ends_early_and_exports_its_best_step(best, tmp_path):
    folder, out = best
    found = {m["step"]: m["eval_loss"] for m in metrics(folder) if "eval_loss" in m}
    del found[0]
    step = min(found, key=found.__getitem__)
    last = max(found)
    assert step < last < STEPS
    assert last - step == 2 * 3
    steps = {int(path.name) for path in (folder / "checkpoints").iterdir()}
    assert steps == {step, last}
    assert f"adapter of step {step} written to best/adapter\n" in out
    assert "ended early: no lower eval_loss in 3 evaluations\n" in out
    flags = ("--model", "hf", "--adapter")
    for chosen in ([folder], [folder / "checkpoints" / str(step)]):
        assert evaluated_loss(*flags, *chosen) == pytest.approx(found[step], abs=2e-6)
    succeed("convert.to_peft", folder, tmp_path / "peft", "--step", last)
    for chosen in ([folder, "--step", last], [tmp_path / "peft"]):
        assert evaluated_loss(*flags, *chosen) == pytest.approx(found[last], abs=2e-6)
    done = call("evaluate", *flags[:2], "--data", "eval.jsonl", "--step", last)
    assert (done.status, done.err.partition(" has no effect")[0]) == (
        2,
        f"error: step={last}",
    )


def test_a_run_that_ends_early_logs_its_last_steps(workdir, tmp_path):
    flags = [*train_flags(tmp_path / "run", *BEST), "--train.log_every", 50]
    with contextlib.chdir(workdir):
        out = succeed("train", *flags)
    *_, last = metrics(tmp_path / "run")
    evaluated = [m["step"] for m in metrics(tmp_path / "run") if "eval_loss" in m]
    assert (last["step"], "loss" in last) == (evaluated[-1], True)
    assert "training 0.0 s" not in out


def test_a_run_that_ended_early_goes_on_only_with_more_patience(best, tmp_path):
    folder = shutil.copytree(best[0], tmp_path / "run")
    before = metrics(folder)
    adapter = adapter_bytes(folder)
    assert "ended early" in succeed("train", *train_flags(folder, *BEST))
    assert (metrics(folder), adapter_bytes(folder)) == (before, adapter)
    flags = [*train_flags(folder, *BEST)[:-1], 4]
    assert "step " in succeed("train", *flags)
    assert len(metrics(folder)) > len(before)


def test_a_run_that_is_stopped_at_an_evaluation_chooses_the_same_step(
    best, tmp_path, monkeypatch
):
    take = Run.log

    def log_and_stop(run: Run, step: int, *rest: Any) -> None:
        take(run, step, *rest)
        if step == 4:
            signal.raise_signal(signal.SIGTERM)

    flags = train_flags(tmp_path / "run", *BEST)
    with monkeypatch.context() as patched:
        patched.setattr(Run, "log", log_and_stop)
        assert call("train", *flags).status == 75
    succeed("train", *flags)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(best[0])
    key = "eval_loss"
    assert [m.get(key) for m in metrics(tmp_path / "run")] == [
        m.get(key) for m in metrics(best[0])
    ]


def test_a_best_step_that_is_damaged_is_replaced_by_the_last_with_a_warning(
    best, tmp_path
):
    folder = shutil.copytree(best[0], tmp_path / "run")
    step, last = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    next((folder / "checkpoints" / str(step)).rglob("metadata")).write_text("")
    done = call("train", *train_flags(folder, *BEST))
    assert done.status == 0
    assert f"warning: step {last} is exported instead of the best: " in done.err
    assert f"adapter of step {last} written" in done.out


def test_evaluations_without_held_out_data_are_refused(tmp_path):
    done = call("train", *train_flags(tmp_path / "run", "--train.eval_every", 5))
    assert done.status == 2
    assert "train.eval_every has no effect without held-out data" in done.err
    assert not (tmp_path / "run").exists()


def test_messages_are_trained_on_too(tmp_path):
    run = tmp_path / "run"
    flags = train_flags(run, "--data.train", "chat.jsonl", "--train.max_steps", 2)
    assert "every assistant turn" in succeed("train", *flags)
    # "The sum is five." has 5 tokens, and the end of its turn is one.
    assert [line["supervised_tokens"] for line in metrics(run)] == [6, 6]


def test_packed_training_has_the_loss_of_the_same_records_in_rows(run, tmp_path):
    flags = train_flags(tmp_path / "run", "--data.packing", "--train.max_steps", 2)
    assert "packed" in succeed("train", *flags)
    # A batch is the whole data set in both.
    assert losses(tmp_path / "run")[0] == pytest.approx(losses(run)[0], rel=1e-5)


def test_a_folder_and_the_base_made_of_it_train_the_same(run, base, tmp_path):
    flags = train_flags(tmp_path / "run", "--model", base)
    succeed("train", *flags)
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
    flags = train_flags(tmp_path / "run", "--data.eval", "eval.jsonl", *more)
    with_steps = [*flags, "--train.max_steps", steps, "--train.save_every", 1]
    succeed("train", *with_steps)
    logged = metrics(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")  # as a run that was killed
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(steps))
    adapter = ("--adapter", tmp_path / "run")
    succeed("convert.to_hf", "--model", "hf", *adapter, tmp_path / "early")
    succeed("train", *with_steps)
    assert [line.get("loss") for line in metrics(tmp_path / "run")] == [
        line.get("loss") for line in logged
    ]
    assert metrics(tmp_path / "run")[-1]["eval_loss"] == logged[-1]["eval_loss"]
    succeed("convert.to_hf", "--model", "hf", *adapter, tmp_path / "merged")
    for model in (("--model", tmp_path / "merged"), ("--model", "hf", *adapter)):
        assert evaluated_loss(*model) == pytest.approx(
            logged[-1]["eval_loss"], abs=2e-5
        )


def test_a_quantised_model_trains_resumes_and_merges(tmp_path):
    base, run, merged = (tmp_path / name for name in ("nf4", "run", "merged"))
    facts = succeed("convert.from_hf", "hf", base, "--quantize", "nf4")
    assert "nf4: the layers' projections" in facts
    nf4 = ["--compute.base_dtype", "nf4", "--train.max_steps"]
    first = succeed("train", *train_flags(run, *nf4, 2))
    assert "all params: 48,544" in first  # 41,120 of the base, as unquantised
    # The same weights, quantised before: the run goes on.
    resumed = succeed("train", *train_flags(run, *nf4, 3, "--model", base))
    assert "resuming after step 2" in resumed
    flags = ["--model", base, "--adapter", run]
    assert "all as written" in succeed("convert.to_hf", *flags, merged)
    assert evaluated_loss(*flags) == pytest.approx(
        evaluated_loss("--model", merged), abs=2e-6
    )
    text = ["--prompt", "What is", "--max_new_tokens", 4]
    assert generated(*flags, *text) == generated("--model", merged, *text)


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
    succeed("train", *train_flags(tmp_path / "run", "--seed", 1))
    assert adapter_bytes(tmp_path / "run") != adapter_bytes(run)


def test_accumulation_gives_the_same_losses(tmp_path):
    flags = ("--train.batch_size", 16, "--train.max_steps", 2)
    succeed("train", *train_flags(tmp_path / "whole", *flags))
    flags = (*flags, "--train.grad_accum_steps", 2)
    succeed("train", *train_flags(tmp_path / "parts", *flags))
    assert len(losses(tmp_path / "parts")) == 2
    assert losses(tmp_path / "parts") == pytest.approx(
        losses(tmp_path / "whole"), rel=1e-6
    )


def test_an_adapter_is_continued(run, tmp_path):
    flags = train_flags(tmp_path / "run", "--init_adapter", run, "--train.max_steps", 1)
    out = succeed("train", *flags)
    assert out.startswith("trainable params: 7,424")
    assert losses(tmp_path / "run")[0] <= losses(run)[-1] * 1.01


def test_a_continued_adapter_keeps_its_own_settings(run, tmp_path):
    flags = [
        *("--model", "hf", "--output_dir", tmp_path / "run", "--data.seq_len", 64),
        *("--data.train", "train.jsonl", "--init_adapter", run / "adapter"),
        *("--train.max_steps", 1, "--lora.lora_dropout", 0.5),
    ]
    done = call("train", *flags, "--lora.r", 2, "--lora.use_dora")
    assert done.status == 2
    assert (
        "no effect: lora.r (it has 8), lora.use_dora (it has False); leave" in done.err
    )
    succeed("train", *flags)
    file = tmp_path / "run" / "config.yaml"
    settings = yaml.safe_load(file.read_text())["lora"]
    assert settings["r"] == 8
    assert settings["lora_dropout"] == 0.5
    # The file says how the adapter is, which is no change.
    succeed("train", "--config", file, "--output_dir", tmp_path / "again")
    assert losses(tmp_path / "again") == losses(tmp_path / "run")


def test_the_last_step_is_logged_however_rare_the_lines_are(tmp_path):
    flags = train_flags(
        tmp_path / "run", "--train.max_steps", 2, "--train.log_every", 10
    )
    succeed("train", *flags)
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [2]
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("steps", [4, STEPS])
def test_training_that_diverges_ends_with_6(steps, tmp_path):
    flags = train_flags(
        tmp_path / "run", "--optim.learning_rate", 1e38, "--optim.warmup_ratio", 0
    )
    done = call("train", *flags, "--train.max_steps", steps)
    assert done.status == 6
    assert "Lower optim.learning_rate" in done.err
    assert not (tmp_path / "run" / "adapter").exists()
    broken = [line for line in metrics(tmp_path / "run") if line.get("non_finite")]
    assert broken[0]["loss"] is None


def test_a_run_folder_in_use_is_refused(tmp_path):
    with locked(tmp_path / "run"):
        done = call("train", *train_flags(tmp_path / "run"))
    assert done.status == 2
    assert "another run is using this folder" in done.err


def test_a_folder_that_may_not_be_written_is_reported(tmp_path, monkeypatch):
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    done = call("train", *train_flags(tmp_path / "run"))
    assert done.status == 2
    assert "cannot be written (Permission denied)" in done.err


def test_a_run_and_its_continuation_are_sent_to_tensorboard(tmp_path):
    flags = train_flags(tmp_path / "run", "--data.eval", "eval.jsonl")
    flags += ["--report.to", "tensorboard", "--train.max_steps"]
    succeed("train", *flags, 1)
    succeed("train", *flags, 2)
    files = sorted((tmp_path / "run" / "tensorboard").iterdir())
    first, second = (file.read_bytes() for file in files)
    for name in (b"train/loss", b"eval/loss", b"best_eval_loss", b"lora_alpha: 8"):
        assert name in first
        assert name in second


@pytest.fixture(scope="module")
def sampled(workdir) -> Path:
    """A run with samples that was continued after its end."""
    flags = train_flags("sampled", "--data.eval", "eval.jsonl", "--mesh.data", 1)
    flags += ["--report.samples", 2]
    with contextlib.chdir(workdir):
        assert "step 0: 2 samples generated in" in succeed("train", *flags)
        before = json.loads((workdir / "sampled" / "generated.json").read_text())
        assert list(before) == ["0", str(STEPS)]
        succeed("train", *flags, "--train.max_steps", STEPS + 1)
    return workdir / "sampled"


def test_samples_are_what_generate_writes_after_the_same_prompts(sampled):
    found = json.loads((sampled / "generated.json").read_text())
    for step, more in (("0", ()), (str(STEPS + 1), ("--adapter", sampled))):
        for sample, letter in zip(found[step], "ac", strict=True):
            asked = ("--prompt", sample["prompt"], "--max_new_tokens", 64)
            written = generated("--model", "hf", *more, *asked)
            assert written == sample["text"] + "\n"
            assert sample["prompt"] == f"What is {letter}?"
            assert sample["reference"] == f" It is {letter}."
    assert found["0"][0]["text"] != found[str(STEPS + 1)][0]["text"]


def test_steps_that_loop_over_layers_change_no_file_but_by_rounding(
    sampled, tmp_path, monkeypatch
):
    flags = train_flags(tmp_path / "run", "--data.eval", "eval.jsonl", "--mesh.data", 1)
    flags += ["--report.samples", 2]
    with monkeypatch.context() as patch:
        patch.setattr(device_model, "LOOPING_PLATFORMS", ("cpu",))
        succeed("train", *flags)
    # A checkpoint of one form goes on in the other.
    succeed("train", *flags, "--train.max_steps", STEPS + 1)
    assert losses(tmp_path / "run") == pytest.approx(losses(sampled), rel=1e-5)
    texts = [(x / "generated.json").read_text() for x in (tmp_path / "run", sampled)]
    assert texts[0] == texts[1]


def test_the_report_shows_samples_before_and_after(sampled, run):
    page = (sampled / "report.html").read_text("utf-8")
    assert "<p>before training</p>" in page
    assert f"<p>after step {STEPS + 1}</p>" in page
    assert "<pre> It is a.</pre>" in page
    assert not (run / "generated.json").exists()
