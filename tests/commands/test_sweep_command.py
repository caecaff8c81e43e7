import contextlib
import shutil
import signal
import threading
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import safetensors.numpy
import yaml
from helpers.commands import HF_CONFIG, Done, adapter_bytes, call, metrics, succeed
from helpers.data_cases import make_files, write_rows
from helpers.tiny import tensors, write_hf

from jlora.report.trackers import TRACKERS
from jlora.train.run import Run

STEPS = 6
SWEEP = """\
plain: {}
wide:
  lora: {r: 4, lora_alpha: 7, rank_pattern: {v_proj: 5}}
  seed: 1
hot: {optim.learning_rate: 0.05, optim.weight_decay: 0.1, optim.loraplus_lr_ratio: 2}
drop: {lora.lora_dropout: 0.3, optim.max_grad_norm: 0.0}
"""
NAMES = ("plain", "wide", "hot", "drop")
WEIGHTS = "adapter/adapter_model.safetensors"
TIMES = ("tokens_per_second", "step_time_s", "data_wait_s", "mfu", "peak_memory_bytes")


def words(out: object, *more: object) -> list[object]:
    return [
        *("--model", "hf", "--output_dir", out, "--data.train", "train.jsonl"),
        *("--data.seq_len", 64, "--lora.r", 2),
        *("--data.eval", "eval.jsonl", "--train.save_every", 3),
        *("--optim.learning_rate", 0.02, "--train.max_steps", STEPS),
        *more,
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    config = {**HF_CONFIG, "num_hidden_layers": 1}
    arrays = {
        key: array * 0.1 if array.ndim == 2 else np.ones_like(array)
        for key, array in tensors(config).items()
    }
    write_hf(folder / "hf", config, arrays)
    for name, data in make_files().items():
        (folder / "hf" / name).write_bytes(data)
    for name, letters in (("train", "abcdefghijklmnop"), ("eval", "ac")):
        rows = [{"prompt": f"What is {x}?", "completion": f" {x}."} for x in letters]
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "sweep.yaml").write_text(SWEEP)
    return folder


@pytest.fixture(autouse=True)
def _inside(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def sweep(place) -> Path:
    with contextlib.chdir(place):
        printed = succeed("train", *words("sweep", "--sweep", "sweep.yaml"))
        Path("sweep/out").write_text(printed)
    return place / "sweep"


def flags_of(name: str) -> list[str]:
    changes: dict[str, Any] = yaml.safe_load(SWEEP)[name]
    flags = []
    for key, value in changes.items():
        for inner, setting in (
            value.items() if isinstance(value, dict) else [("", value)]
        ):
            flags.append(
                f"--{key}.{inner}".rstrip(".") + f"={setting}".replace("'", "")
            )
    return flags


@pytest.mark.parametrize("name", NAMES)
def test_every_adapter_equals_a_run_of_its_own(name, sweep):
    succeed("train", *words(f"alone_{name}", *flags_of(name)))
    alone, own = Path(f"alone_{name}"), sweep / name
    assert [line["step"] for line in metrics(own) if "loss" in line] == [*range(1, 7)]
    for ours, theirs in zip(metrics(own), metrics(alone), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - set(TIMES):
            # Its sums are made in another order beside the others.
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6), key
    ours, theirs = (safetensors.numpy.load_file(x / WEIGHTS) for x in (own, alone))
    assert {k: v.shape for k, v in ours.items()} == {
        k: v.shape for k, v in theirs.items()
    }
    for key in theirs:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=0, atol=2e-5)
    settings = [(x / "adapter/adapter_config.json").read_text() for x in (own, alone)]
    assert settings[0] == settings[1]


def test_every_adapter_has_a_run_folder_of_its_own(sweep):
    for name in NAMES:
        names = {path.name for path in (sweep / name).iterdir()}
        assert names >= {"config.yaml", "metrics.jsonl", "checkpoints", "adapter"}
        assert f"<h1>{name}</h1>" in (sweep / name / "report.html").read_text()
    assert yaml.safe_load((sweep / "config.yaml").read_text())["sweep"] == "sweep.yaml"


def test_lines_say_which_adapter_they_are_about(sweep):
    printed = (sweep / "out").read_text()
    assert "wide: trainable params: " in printed
    assert f"hot: step {STEPS}/{STEPS}  loss " in printed
    assert f"{STEPS} steps of 8 x 64 tokens for each of 4 adapters" in printed


def test_trackers_of_a_sweep_end_at_the_same_time_after_the_reports(monkeypatch):
    all_end = threading.Barrier(2)
    found: list[bool] = []

    class Tracker(MagicMock):
        def close(self, *, failed: bool) -> None:
            all_end.wait(20)  # fails if one is waited for before the other is asked
            found.extend(Path(f"tracked/{x}report.html").exists() for x in ("", "a/"))

    monkeypatch.setitem(TRACKERS, "tensorboard", lambda run: Tracker())
    Path("two.yaml").write_text("{a: {}, b: {}}")
    more = ("--report.to", "tensorboard", "--report.samples", 0, "--train.max_steps", 1)
    succeed("train", *words("tracked", "--sweep", "two.yaml", *more))
    assert found == [True] * 4


def test_a_sweep_ends_with_a_ranking_which_its_report_has_too(sweep):
    lines = (sweep / "out").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("   run "))
    assert "lora.r" in lines[start]
    found = {
        name: min(
            m["eval_loss"]
            for m in metrics(sweep / name)
            if m.get("eval_loss") and m["step"]
        )
        for name in NAMES
    }
    ranked = sorted(found, key=found.__getitem__)
    rows = [line.split() for line in lines[start + 1 :]]
    assert [row[:3] for row in rows] == [
        [str(place), name, f"{found[name]:.4f}"] for place, name in enumerate(ranked, 1)
    ]
    page = (sweep / "report.html").read_text()
    places = [page.index(f"<td>{name}</td>") for name in ranked]
    assert places == sorted(places)


def test_one_adapter_of_a_sweep_goes_on_as_a_run_of_its_own(sweep):
    shutil.copytree(sweep / "wide", "wide_alone")
    more = ("--output_dir", "wide_alone", "--train.max_steps", STEPS + 1)
    printed = succeed("train", "--config", "wide_alone/config.yaml", *more)
    assert f"resuming after step {STEPS}" in printed


def test_a_stopped_sweep_goes_on_to_the_same_adapters(sweep, monkeypatch):
    take = Run.log

    def add(run: Any, step: int, *rest: Any) -> None:
        take(run, step, *rest)
        if (run.name, step) == ("wide", 3):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Run, "log", add)
    done = call("train", *words("stopped", "--sweep", "sweep.yaml"))
    assert done.status == 75
    assert done.err.splitlines()[-1].startswith("stopped: step 3 is saved")
    monkeypatch.undo()
    monkeypatch.chdir(sweep.parent)
    printed = succeed("train", *words("stopped", "--sweep", "sweep.yaml"))
    assert "resuming after step 3" in printed
    for name in NAMES:
        assert adapter_bytes(Path("stopped", name)) == adapter_bytes(sweep / name)


def test_a_sweep_killed_while_saving_goes_on_from_the_last_common_step(sweep):
    shutil.copytree(sweep, "killed")
    shutil.rmtree(f"killed/wide/checkpoints/{STEPS}")
    printed = succeed("train", *words("killed", "--sweep", "sweep.yaml"))
    assert "resuming after step 3" in printed
    assert adapter_bytes(Path("killed/hot")) == adapter_bytes(sweep / "hot")


def test_a_diverging_adapter_leaves_the_others_alone(place):
    Path("wild.yaml").write_text(
        "good: {}\nwild: {optim.learning_rate: 1.0e+30, lora.lora_alpha: 1.0e+9}\n"
    )
    changes = ("--sweep", "wild.yaml", "--train.max_steps", 9)
    done = call("train", *words("wild", *changes))
    assert done.status == 6
    assert "1 of 2 adapters diverged and are not written: wild" in done.err
    assert "wild: training diverged" in done.out
    assert Path("wild/good", WEIGHTS).exists()
    assert not Path("wild/wild/adapter").exists()
    assert metrics(Path("wild/good"))[-2]["step"] == 9


def refused(text: str, *more: object) -> Done:
    Path("refused.yaml").write_text(text)
    done = call("train", *words("refused", "--sweep", "refused.yaml", *more))
    assert not Path("refused").exists()
    return done


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: {train.batch_size: 4}", "a: train.batch_size cannot differ between"),
        ("a: {lora: {target_modules: [q_proj]}}", "lora.target_modules cannot differ"),
        ("a: {optim: {lerning_rate: 1}}", "did you mean 'optim.learning_rate'?"),
        ("a: {optim.learning_rate: -1}", "optim.learning_rate=-1"),
        ("a: {lora.r: two}", "a: lora.r is the text 'two'; expected an integer"),
        ("a: {lora.r: 2.5}", "a: lora.r is '2.5'; expected an integer"),
        ("a: 1", "a is 1; expected settings such as"),
        ("a: {}\nb: {lora.init_lora_weights: pissa}", "adapters a and b of the sweep"),
        ("adapter: {}", "is not a name for an adapter's folder"),
        ("../a: {}", "is not a name for an adapter's folder"),
        ("{}", "no adapters; expected NAME"),
        ("a: {}\na: {}", "the key 'a' occurs twice"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(text, words):
    done = refused(text)
    assert done.status == 2
    assert words in done.err


def test_an_optimizer_of_whole_matrices_is_refused():
    done = refused("a: {}", "--optim.optimizer", "muon")
    assert done.status == 2
    assert "optim.optimizer=muon looks at whole matrices" in done.err


def test_another_set_of_adapters_is_not_mixed_into_a_finished_sweep(sweep):
    shutil.copytree(sweep, "more")
    Path("more.yaml").write_text(f"{SWEEP}new: {{}}\n")
    done = call("train", *words("more", "--sweep", "more.yaml"))
    assert done.status == 2
    assert "more/plain was trained already, without more/new" in done.err
