import contextlib
import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from helpers import ROOT
from helpers.commands import (
    Done,
    adapter_bytes,
    call,
    finish,
    losses,
    metrics,
    start_python,
    succeed,
    train_flags,
)
from helpers.data_cases import write_rows
from helpers.tiny import CONFIG, tensors

from jlora.loading import exported_adapter, open_adapter
from jlora.train.resuming import ADAPTER_FILES, EXPORTED
from jlora.train.run import Run
from jlora.train.stopping import BEFORE_TRAINING, WHILE_TRAINING

pytestmark = pytest.mark.usefixtures("in_workdir")

STEPS = 120


def long_run(folder: object, steps: int = STEPS) -> list[object]:
    return train_flags(folder, "--train.save_every", 10, "--train.max_steps", steps)


def start_train(*flags: object) -> subprocess.Popen[str]:
    return start_python(ROOT / "train.py", *flags)


def send(process: subprocess.Popen[str], signal_number: int, after: int) -> Done:
    """Sends a signal as soon as step `after` is logged; returns how it ended."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(f"step {after}/"):
            process.send_signal(signal_number)
            break
    status, out, err = finish(process)
    return Done(status, "".join(lines) + out, err)


class Interrupted(NamedTuple):
    killed: Done
    stopped: Done
    resumed: Done
    folder: Path
    whole: Path


@pytest.fixture(scope="module")
def interrupted(workdir) -> Interrupted:
    """A run killed, resumed, asked to stop and resumed, beside an uninterrupted one."""
    flags = long_run("cut")
    with contextlib.chdir(workdir):
        killed = send(start_train(*flags), signal.SIGKILL, after=15)
        stopped = send(start_train(*flags), signal.SIGTERM, after=25)
        resumed = call("train", *flags)
        succeed("train", *long_run("whole"))
    return Interrupted(killed, stopped, resumed, workdir / "cut", workdir / "whole")


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
    answer, stopped = err.splitlines()
    assert answer == WHILE_TRAINING
    assert stopped.startswith("stopped: step ")
    step = int(stopped.split()[2])
    assert f"resuming after step {step}\n" in interrupted.resumed.out


def test_an_interrupted_run_ends_with_the_bytes_of_an_uninterrupted_one(interrupted):
    assert interrupted.resumed.status == 0
    assert adapter_bytes(interrupted.folder) == adapter_bytes(interrupted.whole)


def test_an_interrupted_run_has_the_metrics_of_an_uninterrupted_one(interrupted):
    steps = [line["step"] for line in metrics(interrupted.folder)]
    assert steps == list(range(1, STEPS + 1))
    assert losses(interrupted.folder) == losses(interrupted.whole)


def test_only_the_checkpoints_asked_for_are_kept(interrupted):
    names = {path.name for path in (interrupted.whole / "checkpoints").iterdir()}
    assert names == {"110", "120"}


def test_a_finished_run_started_again_changes_nothing(interrupted):
    before = metrics(interrupted.whole), adapter_bytes(interrupted.whole)
    assert f"resuming after step {STEPS}" in succeed("train", *long_run("whole"))
    assert (metrics(interrupted.whole), adapter_bytes(interrupted.whole)) == before


def test_a_run_with_more_steps_than_asked_for_is_refused_untouched(interrupted):
    before = (interrupted.whole / "config.yaml").read_text()
    done = call("train", *train_flags("whole"), "--train.max_steps", 100)
    assert done.status == 2
    assert f"at step {STEPS} already" in done.err
    assert (interrupted.whole / "config.yaml").read_text() == before


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)])
def test_a_checkpoint_of_two_devices_goes_on_with_one_or_eight(mesh, tmp_path):
    def train(folder, sizes, steps):
        flags = train_flags(folder, "--mesh.data", sizes[0], "--mesh.fsdp", sizes[1])
        flags += ["--optim.lr_schedule", "constant", "--optim.warmup_ratio", 0]
        return succeed("train", *flags, "--train.max_steps", steps)

    assert " steps of 8 x 64 tokens on 2 of 8 cpu: " in train(tmp_path / "a", (1, 2), 3)
    assert "resuming after step 3\n" in train(tmp_path / "a", mesh, 6)
    train(tmp_path / "b", (1, 2), 6)
    # Float32 sums in another order.
    np.testing.assert_allclose(
        losses(tmp_path / "a"), losses(tmp_path / "b"), rtol=1e-4
    )
    assert len(losses(tmp_path / "a")) == 6


def test_a_resumed_run_says_which_settings_changed(interrupted, tmp_path):
    shutil.copytree(interrupted.whole, tmp_path / "run")
    flags = train_flags(tmp_path / "run", "--optim.adam_b2", 0.99)
    out = succeed("train", *flags, "--train.max_steps", STEPS + 1)
    assert "note: optim.adam_b2 is 0.99, was 0.999\n" in out
    assert f"note: train.max_steps is {STEPS + 1}, was {STEPS}\n" in out
    assert "note: model" not in out


@pytest.mark.parametrize("records_step", [True, False])
def test_a_run_that_goes_on_and_is_stopped_keeps_its_adapter_and_uses_the_checkpoint(
    interrupted, records_step, tmp_path
):
    folder = tmp_path / "longer"
    shutil.copytree(interrupted.whole, folder)
    if not records_step:  # as a run of an earlier version
        (folder / EXPORTED).unlink()
    before = adapter_bytes(folder)
    process = start_train(*long_run(folder, 4000))
    assert send(process, signal.SIGTERM, after=STEPS + 1).status == 75
    assert adapter_bytes(folder) == before
    assert exported_adapter(folder) is None
    assert exported_adapter(interrupted.whole) == interrupted.whole / "adapter"


@pytest.mark.parametrize("name", [*ADAPTER_FILES, EXPORTED])
def test_an_adapter_that_was_changed_since_its_export_is_not_used(
    finished, name, capsys
):
    expected = open_adapter(finished)
    file = next(finished.rglob(name))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    found = open_adapter(finished)
    assert "not as it was exported; the newest checkpoint" in capsys.readouterr().err
    assert found.scalings == expected.scalings
    jax.tree.map(np.testing.assert_array_equal, found.tensors, expected.tensors)


@pytest.mark.parametrize("with_run", [False, True])
def test_an_adapter_folder_that_no_run_has_written_is_not_replaced(
    interrupted, with_run, tmp_path
):
    folder = tmp_path / "run"
    if with_run:
        shutil.copytree(interrupted.whole, folder)
    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    (folder / "adapter" / "notes.txt").write_text("mine")
    done = call("train", *train_flags(folder))
    assert done.status == 2
    assert "holds notes.txt, which this run did not write" in done.err
    assert (folder / "adapter" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("moment", ["trainable params", "compiling the train step"])
def test_a_run_that_is_stopped_before_its_first_step_ends_without_it(moment, tmp_path):
    process = start_train(*long_run(tmp_path / "early", 4000))
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith(moment))
    process.send_signal(signal.SIGINT)
    status, _, err = finish(process)
    assert status == 75
    assert err == (
        f"{BEFORE_TRAINING}\nstopped: no step was made; run it again to go on\n"
    )
    assert not (tmp_path / "early" / "checkpoints").exists()


def test_an_evaluation_that_is_due_at_the_step_of_a_stop_is_made(tmp_path, monkeypatch):
    take = Run.log

    def log_and_stop(run: Run, step: int, *rest: Any) -> None:
        take(run, step, *rest)
        if step == 20:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Run, "log", log_and_stop)
    folder = tmp_path / "run"
    evaluation = ("--data.eval", "eval.jsonl", "--train.eval_every", 20)
    assert call("train", *train_flags(folder, *evaluation)).status == 75
    assert [m["step"] for m in metrics(folder) if "eval_loss" in m] == [0, 20]
    assert (folder / "checkpoints" / "20").is_dir()


def test_a_line_after_a_resume_is_the_mean_of_the_steps_before_it_too(
    tmp_path, monkeypatch
):
    evaluation = ("--data.eval", "eval.jsonl", "--train.eval_every", 4)
    more = ("--train.max_steps", 9, "--train.log_every", 4, *evaluation)
    whole, cut = (
        train_flags(tmp_path / "whole", *more),
        train_flags(tmp_path / "cut", *more),
    )
    succeed("train", *whole)
    take = Run.log

    def log_and_stop(run: Run, step: int, *rest: Any) -> None:
        take(run, step, *rest)
        if step == 6:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "log", log_and_stop)
        assert call("train", *cut).status == 75
    out = succeed("train", *cut)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 3
    best = min(m["eval_loss"] for m in metrics(tmp_path / "whole") if "eval_loss" in m)
    assert f"best eval_loss {best:.4f}" in out


def test_resume_never_refuses_a_folder_with_a_run(run):
    done = call("train", *train_flags(run, "--resume", "never"))
    assert done.status == 2
    assert "holds a run already" in done.err


def test_resume_must_refuses_a_folder_without_a_run(tmp_path):
    done = call("train", *train_flags(tmp_path / "new", "--resume", "must"))
    assert done.status == 2
    assert "no checkpoint to resume from" in done.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora.r", 4], "lora.r is 4, was 8"),
        (["--seed", 1], "seed is 1, was 0"),
        (["--optim.optimizer", "lion"], 'optim.optimizer is "lion", was "adamw"'),
        (["--train.batch_size", 16], "batch_size is 16, was 8"),
        (["--data.train", "eval.jsonl"], "the data differs"),
        (["--data.packing", "true"], "data.packing is true, was false"),
        (["--data.seq_len", 32], "data.seq_len is 32, was 64"),
        (["--compute.base_dtype", "bfloat16"], "the base differs"),
    ],
)
def test_a_run_is_resumed_only_with_what_it_began_with(run, more, message):
    done = call("train", *train_flags(run, *more))
    assert done.status == 2
    assert message in done.err
    assert len(done.err) < 400


@pytest.fixture
def finished(run, tmp_path) -> Path:
    """A copy of a finished run, and of its model as `hf` in the working directory."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "rope_theta",
            5e5,
            "rope_parameters.rope_theta is 500000.0, was 10000.0",
        ),
        ("rms_norm_eps", 1e-6, "config.rms_norm_eps is 1e-06, was 1e-05"),
        (
            "rope_scaling",
            {"rope_type": "linear", "factor": 2.0},
            'rope_parameters.factor is 2.0, was 1.0, rope_parameters.rope_type is "linear"',
        ),
    ],
)
def test_a_run_whose_model_has_another_configuration_is_not_resumed(
    finished, workdir, key, value, message, tmp_path
):
    shutil.copytree(workdir / "hf", tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    succeed("convert.from_hf", tmp_path / "hf", tmp_path / "base")
    for model in ("hf", "base"):
        flags = train_flags(finished, "--train.max_steps", STEPS)
        flags[1] = tmp_path / model
        done = call("train", *flags)
        assert done.status == 2
        assert message in done.err
        assert f"init_adapter={finished} continues its adapter" in done.err


def test_a_run_whose_model_has_other_heads_is_not_resumed(finished, workdir, tmp_path):
    shutil.copytree(workdir / "hf", tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    file.write_text(json.dumps(json.loads(file.read_text()) | heads))
    flags = train_flags(finished)
    flags[1] = tmp_path / "hf"
    done = call("train", *flags)
    assert done.status == 2
    for name, (new, old) in {
        "head_dim": (4, 8),
        "num_attention_heads": (8, 4),
        "num_key_value_heads": (4, 2),
    }.items():
        assert f"config.{name} is {new}, was {old}" in done.err


def test_a_run_whose_gguf_has_another_configuration_is_not_resumed(tmp_path):
    gguf_files = pytest.importorskip("helpers.gguf_files")
    write_rows(tmp_path / "data.jsonl", [{"text": "hello 12"}])

    def start(theta: float) -> Done:
        model = tmp_path / f"{theta}.gguf"
        changes = {"llama.rope.freq_base": theta}
        gguf_files.write_gguf(model, tensors(CONFIG), changes)
        flags = ("--model", model, "--output_dir", tmp_path / "run", "--data.train")
        return call("train", *flags, tmp_path / "data.jsonl", "--train.max_steps", 1)

    assert start(10000.0).status == 0
    done = start(20000.0)
    assert done.status == 2
    assert "rope_parameters.rope_theta is 20000.0, was 10000.0" in done.err


def test_a_run_with_another_chat_template_is_not_resumed(finished, workdir, tmp_path):
    shutil.copytree(workdir / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    flags = train_flags(finished)
    flags[1] = tmp_path / "hf"
    done = call("train", *flags)
    assert done.status == 2
    assert "the tokenizer or its chat template differs" in done.err


def test_a_run_of_another_jlora_is_not_resumed_but_its_adapter_is_continued(
    finished, tmp_path, monkeypatch
):
    monkeypatch.setattr("jlora.train.run._jlora_version", lambda: "9.9.9")
    done = call("train", *train_flags(finished))
    assert done.status == 2
    assert 'jlora is "9.9.9", was "' in done.err
    flags = train_flags(tmp_path / "new", "--init_adapter", finished)
    succeed("train", *flags, "--train.max_steps", 1)


def test_a_run_that_recorded_no_configuration_is_refused_with_a_way_out(
    finished, tmp_path
):
    for file in finished.glob("checkpoints/*/meta/metadata"):
        meta = json.loads(file.read_text())
        for key in ("config", "rope_parameters", "jlora", "init_adapter"):
            del meta["identity"][key]
        for key in ("digest", "files"):
            del meta[key]
        file.write_text(json.dumps(meta | {"schema": 2}))
    done = call("train", *train_flags(finished))
    assert done.status == 3
    assert "another output_dir, where init_adapter=RUN continues" in done.err
    flags = train_flags(tmp_path / "new", "--init_adapter", finished)
    succeed("train", *flags, "--train.max_steps", 1)


def test_a_run_that_continues_another_adapter_is_not_resumed(finished, tmp_path):
    flags = train_flags(tmp_path / "new", "--train.max_steps", 1, "--init_adapter")
    succeed("train", *flags, finished)
    other = tmp_path / "new" / "adapter"
    for given in ([*flags, other], flags[:-1]):
        done = call("train", *given)
        assert done.status == 2
        assert "the adapter that it continues (init_adapter) differs" in done.err
