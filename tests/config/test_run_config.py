import pytest

from jlora.config.optim_config import OptimConfig
from jlora.config.report_config import ReportConfig
from jlora.config.run_config import (
    ComputeConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    TrainConfig,
)
from jlora.config.sampling_config import SamplingConfig, TextConfig
from jlora.errors import UsageError

NAN = float("nan")


@pytest.mark.parametrize(
    ("group", "changes", "words"),
    [
        (DataConfig, {"seq_len": 1}, "data.seq_len=1"),
        (OptimConfig, {"learning_rate": -1.0}, "optim.learning_rate=-1.0"),
        (OptimConfig, {"learning_rate": NAN}, "optim.learning_rate=nan"),
        (OptimConfig, {"learning_rate": 1e300}, "optim.learning_rate=1e.300"),
        (OptimConfig, {"weight_decay": 1e300}, "optim.weight_decay=1e.300"),
        (OptimConfig, {"max_grad_norm": 1e300}, "optim.max_grad_norm=1e.300"),
        (OptimConfig, {"adam_eps": 1e-300}, "optim.adam_eps=1e-300"),
        (TrainConfig, {"num_epochs": 1e300}, "train.num_epochs=1e.300"),
        (OptimConfig, {"learning_rate": float("inf")}, "optim.learning_rate=inf"),
        (OptimConfig, {"weight_decay": -0.1}, "optim.weight_decay=-0.1"),
        (OptimConfig, {"max_grad_norm": -1.0}, "optim.max_grad_norm=-1.0"),
        (OptimConfig, {"adam_eps": -1.0}, "optim.adam_eps=-1.0"),
        (OptimConfig, {"adam_eps": 0.0}, "optim.adam_eps=0.0; expected a number above"),
        (OptimConfig, {"warmup_ratio": 1.5}, "optim.warmup_ratio=1.5"),
        (OptimConfig, {"adam_b1": 1.0}, "optim.adam_b1=1.0"),
        (OptimConfig, {"adam_b2": NAN}, "optim.adam_b2=nan"),
        (TrainConfig, {"max_steps": -1}, "train.max_steps=-1"),
        (TrainConfig, {"num_epochs": 0.0}, "train.num_epochs=0.0"),
        (TrainConfig, {"num_epochs": NAN}, "train.num_epochs=nan"),
        (TrainConfig, {"num_epochs": float("inf")}, "train.num_epochs=inf"),
        (TrainConfig, {"batch_size": 0}, "train.batch_size=0"),
        (TrainConfig, {"grad_accum_steps": 0}, "train.grad_accum_steps=0"),
        (TrainConfig, {"log_every": 0}, "train.log_every=0"),
        (TrainConfig, {"save_every": -1}, "train.save_every=-1"),
        (TrainConfig, {"eval_every": -1}, "train.eval_every=-1"),
        (TrainConfig, {"keep": 0}, "train.keep=0"),
        (MeshConfig, {"tensor": -1}, "mesh.tensor=-1"),
        (ReportConfig, {"samples": -1}, "report.samples=-1"),
        (TextConfig, {"top_p": 0.9}, "^top_p has no effect with temperature=0"),
        (ReportConfig, {"to": "none"}, "leave report.to out to have no tracker"),
        (ReportConfig, {"to": "wandbb"}, "report.to='wandbb'.*did you mean 'wandb'"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_flag(group, changes, words):
    with pytest.raises(UsageError, match=words):
        group(**changes)


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_with_its_extra(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(UsageError, match=rf"report.to={name} .*'jlora\[{name}\]'"):
        ReportConfig(to=[name])


def test_two_samples_are_generated_where_there_is_held_out_data():
    assert ReportConfig().num_samples(has_data=True) == 2
    assert ReportConfig().num_samples(has_data=False) == 0
    assert ReportConfig(samples=0).num_samples(has_data=True) == 0


def test_trackers_are_given_in_one_word_or_as_a_list():
    assert ReportConfig(to="tensorboard, tensorboard").trackers == ["tensorboard"]
    assert ReportConfig(to=["tensorboard"]).trackers == ["tensorboard"]
    assert ReportConfig().trackers == []


def test_a_batch_that_cannot_be_split_is_refused_with_both_numbers():
    with pytest.raises(UsageError, match=r"batch_size=8 .*grad_accum_steps=3"):
        TrainConfig(batch_size=8, grad_accum_steps=3)


@pytest.mark.parametrize(
    "group", [DataConfig, OptimConfig, TrainConfig, MeshConfig, ComputeConfig]
)
def test_the_defaults_are_valid(group):
    group()


@pytest.mark.parametrize(
    ("make", "without"),
    [
        (lambda: OptimConfig(loraplus_lr_embedding=1e-5), "optim.loraplus_lr_ratio"),
        (lambda: OptimConfig(optimizer="lion", adam_b2=0.99), "optim.optimizer=lion"),
        (lambda: OptimConfig(min_lr_ratio=0.1), "optim.lr_schedule=linear"),
        (lambda: OptimConfig(lr_schedule="cosine", decay_ratio=0.2), "it is for wsd"),
        (lambda: DataConfig(max_bad_rows=5), "data.on_bad_row=fail"),
        (lambda: TrainConfig(early_stopping_patience=2), "train.eval_every"),
        (lambda: TrainConfig(keep_best=True), "train.eval_every"),
        (lambda: TrainConfig(max_steps=9, num_epochs=2.0), "train.max_steps=9"),
        (
            lambda: OptimConfig(warmup_steps=9, warmup_ratio=0.1),
            "optim.warmup_steps=9",
        ),
        (lambda: ReportConfig(project="mine"), "report.to=wandb"),
        (lambda: TextConfig(top_p=0.9), "temperature=0"),
        (lambda: TextConfig(top_k=5, min_p=0.1), "temperature=0"),
        (lambda: ModelConfig(model="m", step=3), "without an adapter"),
        (lambda: ReportConfig(samples=1).num_samples(has_data=False), "held-out data"),
    ],
)
def test_a_setting_without_effect_is_refused(make, without):
    with pytest.raises(UsageError, match=f"ha(s|ve) no effect .*{without}"):
        make()


def test_a_warm_up_in_steps_may_say_that_it_has_no_ratio():
    assert OptimConfig(warmup_steps=9, warmup_ratio=0).warmup_steps == 9


def test_a_server_takes_what_clients_send_beside_a_temperature_of_0():
    assert SamplingConfig(top_p=0.9).steps == set()
