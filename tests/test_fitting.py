import contextlib
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from helpers.commands import adapter_bytes, losses, make_workdir, succeed, train_flags

import jlora
from jlora.cli.flags import flags_of
from jlora.cli.jlora_command import load_command
from jlora.cli.strict_yaml import read_yaml
from jlora.errors import StopRequested, UsageError
from jlora.fitting import Fitted
from jlora.train.run import Run

ROWS = [{"prompt": f"What is {x}?", "completion": f" It is {x}."} for x in "abcdefgh"]
SETTINGS: dict[str, Any] = {
    "seq_len": 64,
    "target_modules": "all-linear",
    "learning_rate": 0.02,
    "max_steps": 4,
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    return make_workdir(tmp_path_factory.mktemp("fitting"))


@pytest.fixture
def in_workdir(workdir, monkeypatch):
    monkeypatch.chdir(workdir)


@pytest.fixture(scope="module")
def command(workdir) -> Path:
    """The run of `jlora train` that those of `jlora.fit` have to equal."""
    with contextlib.chdir(workdir):
        succeed("train", *train_flags("command", "--train.max_steps", 4))
    return workdir / "command"


@pytest.fixture(scope="module")
def fitted(workdir) -> Fitted:
    def fit() -> Fitted:
        return jlora.fit("hf", ROWS, "fitted", **SETTINGS)

    # Not in the main thread, which alone could be interrupted.
    with contextlib.chdir(workdir), ThreadPoolExecutor(1) as pool:
        return pool.submit(fit).result()


def test_it_is_the_run_of_the_command_bit_for_bit(fitted, command, workdir):
    assert adapter_bytes(workdir / fitted.folder) == adapter_bytes(command)
    assert losses(workdir / fitted.folder) == losses(command)


def test_the_result_generates_is_saved_and_tells_of_its_run(
    fitted, workdir, tmp_path, in_workdir
):
    model, params, tokenizer = fitted
    text = jlora.generate(model, params, tokenizer, "What is", max_new_tokens=4)
    assert text == jlora.generate(
        *jlora.load("hf", fitted.folder), "What is", max_new_tokens=4
    )
    merged = jlora.merge(params)
    assert text == jlora.generate(model, merged, tokenizer, "What is", max_new_tokens=4)
    jlora.save_adapter(params, fitted.lora, tmp_path / "saved", "hf")
    weights = "adapter_model.safetensors"
    saved = (tmp_path / "saved" / weights).read_bytes()
    assert saved == adapter_bytes(workdir / fitted.folder)
    assert [line["step"] for line in fitted.metrics] == [1, 2, 3, 4]
    assert [line["loss"] for line in fitted.metrics] == losses(workdir / fitted.folder)
    assert repr(fitted) == "<Fitted in fitted: finished at step 4>"


def test_a_loaded_model_is_used_as_it_is_and_settings_may_be_groups(
    command, workdir, in_workdir
):
    loaded = jlora.load("hf")
    before = jax.tree.map(np.array, loaded.params)
    groups = {
        "data": {"seq_len": 64},
        "lora": jlora.LoraConfig(target_modules="all-linear"),
        "optim.learning_rate": 0.02,
    }
    fitted = jlora.fit(loaded, "train.jsonl", "loaded", max_steps=4, **groups)
    assert adapter_bytes(workdir / "loaded") == adapter_bytes(command)
    kernel = fitted.params["layers"]["0"]["self_attn"]["q_proj"]["kernel"]
    assert np.array_equal(
        kernel, before["layers"]["0"]["self_attn"]["q_proj"]["kernel"]
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded.params, before))
    with pytest.raises(UsageError, match="has an adapter already; give its base"):
        jlora.fit(fitted, ROWS, "more", **SETTINGS)


def test_a_run_that_is_interrupted_returns_and_goes_on(
    fitted, workdir, in_workdir, monkeypatch, capsys
):
    take = Run.log
    number = signal.SIGINT

    def log_and_stop(run: Run, step: int, *rest: Any) -> None:
        take(run, step, *rest)
        signal.raise_signal(number)

    settings = {**SETTINGS, "eval_records": "eval.jsonl", "eval_at_start": False}
    with monkeypatch.context() as patched:
        patched.setattr(Run, "log", log_and_stop)
        stopped = jlora.fit("hf", ROWS, "stopped", **settings)
        assert not stopped.is_finished
        assert repr(stopped) == "<Fitted in stopped: stopped at step 1>"
        assert capsys.readouterr().out.endswith(
            "stopped: step 1 is saved; run it again to go on\n"
        )
        number = signal.SIGTERM
        with pytest.raises(StopRequested, match="step 2 is saved"):
            jlora.fit("hf", ROWS, "stopped", **settings)
    done = jlora.fit("hf", ROWS, "stopped", **settings)
    assert done.is_finished
    assert adapter_bytes(workdir / "stopped") == adapter_bytes(workdir / fitted.folder)
    assert [line["step"] for line in done.metrics] == [1, 2, 3, 4, 4]
    assert "eval_loss" in done.metrics[-1]


@pytest.mark.parametrize(
    ("records", "settings", "message"),
    [
        (ROWS, {"lr": 1e-4}, "unknown key 'lr'; did you mean 'optim.learning_rate'"),
        (ROWS, {"lora": {"rank": 8}}, "unknown key 'lora.rank'; did you mean 'lora.r'"),
        (ROWS, {"max_steps": "4"}, r"train.max_steps is the text '4'; expected an int"),
        (ROWS, {"max_steps": 4, "num_epochs": 2.0}, "num_epochs=2.0 has no effect"),
        (ROWS, {"sweep": "a.yaml"}, "sweep is not a setting here"),
        (ROWS, {"train": "a.jsonl"}, "train is 'a.jsonl'; expected keys below it"),
        (ROWS, {"learning_rate": object()}, "optim.learning_rate is '\"<object"),
        (ROWS, {"learning_rate": np.ones(2)}, r"optim.learning_rate is '\[1.0, 1.0\]'"),
        (ROWS, {"eval_records": [{"text": {1}}]}, r"eval_records\[0\] is no JSON"),
        (ROWS, {"eval_records": ROWS, "eval_fraction": 0.5}, "are both given"),
        ([], {}, "records is empty"),
        ([{"text": "a"}, ["b"]], {}, r"records\[1\] is \['b'\]; expected a dict"),
        ([{"text": {1}}], {}, r"records\[0\] is no JSON: Object of type set"),
        ([{"text": float("nan")}], {}, r"records\[0\] is no JSON"),
        ("missing.jsonl", {}, "missing.jsonl: no such file"),
    ],
)
def test_a_mistake_is_told_and_leaves_no_run(
    records, settings, message, workdir, in_workdir
):
    with pytest.raises(UsageError, match=message):
        jlora.fit("hf", records, "mistake", **settings)
    assert not (workdir / "mistake").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"records": None}, "records is of type NoneType; expected dicts, a path"),
        ({"eval_records": 3}, "eval_records is of type int; expected dicts, a path"),
        ({"output_dir": None}, "output_dir is of type NoneType; expected a path"),
        ({"model": (1, 2, 3)}, "model is of type tuple; expected a path or what jlora"),
    ],
)
def test_an_argument_of_another_type_is_told(
    changes, message, workdir, in_workdir, monkeypatch
):
    # Outside of the tests nothing else checks types.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    given: Any = {"model": "hf", "records": ROWS, "output_dir": "mistake", **changes}
    with pytest.raises(UsageError, match=message):
        jlora.fit(**given)
    assert not (workdir / "mistake").exists()


def test_a_missing_base_leaves_no_run(workdir, in_workdir):
    with pytest.raises(UsageError, match="no_base"):
        jlora.fit("./no_base", ROWS, "mistake")
    assert not (workdir / "mistake").exists()


def test_scalars_of_numpy_and_jax_are_settings(fitted, workdir, in_workdir):
    settings = {
        **SETTINGS,
        "max_steps": np.int64(4),
        "optim": {"learning_rate": np.float64(0.02)},
        "lora": {"r": jnp.asarray(8), "use_rslora": np.bool_(False)},
        "adam_b1": np.float32(0.9),
        "adam_b2": np.array(0.999),
    }
    del settings["learning_rate"]
    jlora.fit("hf", ROWS, "scalars", **settings)
    written = read_yaml(workdir / "scalars" / "config.yaml")
    assert written["optim"]["adam_b1"] == np.float32(0.9).item()
    assert written["optim"]["learning_rate"] == 0.02
    assert written["train"]["max_steps"] == 4
    assert written["lora"]["r"] == 8


def test_a_base_of_another_dtype_than_asked_for_is_refused(in_workdir):
    with pytest.raises(
        UsageError, match="base_dtype=nf4, and the model is loaded as fl"
    ):
        jlora.fit(jlora.load("hf"), ROWS, "mistake", base_dtype="nf4")


def test_a_setting_s_own_name_says_its_group():
    """So that jlora.fit takes every one without its group, but those named as a group."""
    keys = flags_of(load_command("train").Arguments)
    groups = {key.partition(".")[0] for key in keys if "." in key}
    names = [key.rpartition(".")[2] for key in keys]
    assert sorted({*names} - groups) == sorted(
        name for name in names if name not in groups
    )
