import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import evaluate
import generate
import train
from convert import from_hf, to_hf, to_peft
from jlora.cli import run_command
from tests.data_cases import chat, make_files, write_rows
from tests.tiny import CONFIG, tensors, write_hf

ROOT = Path(__file__).parent.parent
MODEL = {**CONFIG, "vocab_size": 500, "max_position_embeddings": 256}
STEPS = 6
KEYS = {
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "supervised_tokens",
    "tokens_per_second",
    "step_time_s",
    "mfu",
    "peak_memory_bytes",
}


@dataclass(frozen=True)
class Place:
    model: Path
    data: Path
    run: Path

    def flags(self, output: Path, *more: object) -> list[str]:
        words: list[object] = ["--model", self.model, "--data.train", self.data]
        words += ["--data.eval", self.data, "--output_dir", output]
        words += ["--data.seq_len", 64, "--mesh.data", 8, "--train.batch_size", 8]
        words += ["--train.max_steps", STEPS, "--train.save_every", 2]
        words += ["--optim.learning_rate", 0.02, "--lora.lora_dropout", 0.1]
        words += ["--lora.target_modules", "all-linear", "--lora.lora_alpha", 64, *more]
        return [str(word) for word in words]


def call(module: Any, *words: object, positional: tuple[str, ...] = ()) -> int:
    argv = [str(word) for word in words]
    return run_command(module.main, module.Arguments, positional=positional, argv=argv)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    arrays = {key: 0.1 * array for key, array in tensors(MODEL).items()}
    model = write_hf(folder / "model", MODEL, arrays)
    for name, content in make_files().items():
        (model / name).write_bytes(content)
    rows = [chat(f"say {i}", f"it is {i}") for i in range(24)]
    place = Place(model, write_rows(folder / "rows.jsonl", rows), folder / "run")
    assert call(train, *place.flags(place.run)) == 0
    return place


def metrics(run: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_writes_all_its_files(place):
    names = {path.name for path in place.run.iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "adapter",
        "report.png",
    } <= names


def test_every_step_has_its_line_with_all_keys(place):
    steps = [m for m in metrics(place.run) if "loss" in m]
    assert [m["step"] for m in steps] == list(range(1, STEPS + 1))
    assert all(m.keys() >= KEYS for m in steps)


def test_the_loss_falls(place):
    # A random base leaves little to learn in six steps; dropout alone moves it by 0.003.
    losses = [m["loss"] for m in metrics(place.run) if "loss" in m]
    assert losses[-1] < losses[0] - 0.03


def test_the_parameter_line_comes_first(place, tmp_path, capsys):
    assert call(train, *place.flags(tmp_path / "run"), "--plan") == 0
    assert capsys.readouterr().out.startswith("trainable params: ")


def test_plan_writes_nothing(place, tmp_path):
    assert call(train, *place.flags(tmp_path / "run"), "--plan") == 0
    assert not (tmp_path / "run").exists()


def test_evaluate_gives_the_runs_own_held_out_loss(place, capsys):
    words = ["--model", place.model, "--adapter", place.run, "--data", place.data]
    assert call(evaluate, *words, "--seq_len", 64) == 0
    loss = float(capsys.readouterr().out.split("loss: ")[1].split()[0])
    assert loss == pytest.approx(metrics(place.run)[-1]["eval_loss"], abs=2e-6)


def test_the_merged_model_evaluates_as_base_and_adapter(place, tmp_path, capsys):
    out = tmp_path / "merged"
    words = ["--model", place.model, "--adapter", place.run, out]
    assert call(to_hf, *words, positional=("out",)) == 0
    assert call(evaluate, "--model", out, "--data", place.data, "--seq_len", 64) == 0
    loss = float(capsys.readouterr().out.split("\nloss: ")[1].split()[0])
    assert loss == pytest.approx(metrics(place.run)[-1]["eval_loss"], abs=1e-5)


def test_the_exported_adapter_is_the_runs_own(place, tmp_path):
    out = tmp_path / "adapter"
    assert call(to_peft, "--adapter", place.run, out, positional=("out",)) == 0
    assert (out / "adapter_model.safetensors").read_bytes() == adapter_bytes(place.run)


def test_a_converted_base_trains_as_the_folder_it_came_from(place, tmp_path):
    base = tmp_path / "base"
    assert call(from_hf, place.model, base, positional=("src", "out")) == 0
    run = tmp_path / "run"
    assert call(train, *place.flags(run, "--model", base)) == 0
    assert adapter_bytes(run) == adapter_bytes(place.run)


def test_the_saved_configuration_repeats_the_run(place, tmp_path):
    run = tmp_path / "again"
    config = place.run / "config.yaml"
    assert call(train, "--config", config, "--output_dir", run) == 0
    assert adapter_bytes(run) == adapter_bytes(place.run)


def test_generate_completes_and_chats(place, capsys):
    words = ["--model", place.model, "--adapter", place.run, "--max_new_tokens", 4]
    assert call(generate, *words, "--prompt", "say") == 0
    assert call(generate, *words, "--prompt", "say 3", "--chat") == 0
    assert not capsys.readouterr().err


def test_a_finished_run_is_not_trained_again(place, capsys):
    before = adapter_bytes(place.run)
    assert call(train, *place.flags(place.run)) == 0
    assert f"resuming after step {STEPS}" in capsys.readouterr().out
    assert adapter_bytes(place.run) == before


def test_a_run_stopped_by_sigterm_ends_as_an_uninterrupted_one(place, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "train.py", *place.flags(run, "--train.max_steps", 400)]
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as job:
        deadline = time.monotonic() + 120
        while not (run / "checkpoints" / "2").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        _, error = job.communicate(timeout=60)
    assert job.returncode == 75
    assert b"is saved" in error
    assert b"Traceback" not in error
    stopped = max(int(path.name) for path in (run / "checkpoints").iterdir())
    assert metrics(run)[-1]["step"] == stopped
    longer = ["--train.max_steps", stopped + 2, "--optim.lr_schedule", "constant"]
    words = place.flags(run, *longer)
    assert call(train, *words, "--resume", "must") == 0
    assert np.isfinite(metrics(run)[-1]["eval_loss"])


def test_a_resumed_run_has_the_bytes_of_an_uninterrupted_one(place, tmp_path):
    run = tmp_path / "run"
    flags = ["--optim.lr_schedule", "constant", "--optim.warmup_ratio", 0]
    assert call(train, *place.flags(run, *flags, "--train.max_steps", 3)) == 0
    assert call(train, *place.flags(run, *flags)) == 0
    whole = tmp_path / "whole"
    assert call(train, *place.flags(whole, *flags)) == 0
    assert adapter_bytes(run) == adapter_bytes(whole)


def test_training_goes_on_from_a_peft_folder(place, tmp_path):
    words = place.flags(tmp_path / "run", "--init_adapter", place.run / "adapter")
    assert call(train, *words) == 0
    first = next(m["loss"] for m in metrics(tmp_path / "run") if "loss" in m)
    assert first < metrics(place.run)[0]["loss"] - 0.03


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--model", "nowhere"], 2, "no such file or folder"),
        (["--data.train", "nowhere.jsonl"], 2, "nowhere.jsonl"),
        (["--data.seq_len", "1024"], 2, "max_position_embeddings=256"),
        (["--train.batch_size", "3"], 2, "does not divide"),
        (["--mesh.data", "3"], 2, "does not make 8 devices"),
        (["--mesh.data", "1", "--mesh.tensor", "8"], 2, "legal"),
        (["--lora.target_modules", "[q_prj]"], 2, "q_proj"),
        (["--lora.target_modules", "[lm_head]"], 3, "not supported"),
        (["--compute.base_dtype", "nf4"], 3, "nf4"),
        (["--lora.use_dora"], 3, "use_dora"),
        (["--resume", "must"], 2, "no checkpoint"),
        (["--compute.attention", "cudnn"], 2, "needs an NVIDIA GPU"),
    ],
)
def test_a_mistake_is_one_message_and_writes_nothing(
    place, tmp_path, capsys, words, status, message
):
    run = tmp_path / "run"
    assert call(train, *place.flags(run, *words)) == status
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (run / "adapter").exists()


def test_a_broken_line_is_named_by_file_line_and_column(place, tmp_path, capsys):
    data = write_rows(tmp_path / "bad.jsonl", [chat("a", "b"), '{"messages": ['])
    words = place.flags(tmp_path / "run", "--data.train", data)
    assert call(train, *words) == 4
    assert "bad.jsonl" in (error := capsys.readouterr().err)
    assert "line 2" in error


def test_resume_never_refuses_a_folder_with_a_run(place, capsys):
    assert call(train, *place.flags(place.run), "--resume", "never") == 2
    assert "holds a run already" in capsys.readouterr().err


def test_a_model_that_is_no_llama_is_refused(place, tmp_path, capsys):
    other = {**MODEL, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    folder = write_hf(tmp_path / "qwen", other, tensors(MODEL))
    assert call(evaluate, "--model", folder, "--data", place.data) == 3
    assert "is not a Llama" in capsys.readouterr().err


def test_a_run_loads_no_other_framework_and_opens_no_socket(place, tmp_path):
    script = f"""
import sys
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise SystemExit("a socket was opened: " + repr(arguments))
sys.addaudithook(hook)
import train
from jlora.cli import run_command
words = {place.flags(tmp_path / "run")!r}
assert run_command(train.main, train.Arguments, argv=words) == 0
print(sorted({{"torch", "tensorflow", "transformers", "peft"}} & set(sys.modules)))
"""
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    job = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert job.returncode == 0, job.stderr
    assert job.stdout.splitlines()[-1] == "[]"
