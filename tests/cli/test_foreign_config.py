import pytest
from helpers import GOLDEN

import evaluate
import generate
import train
from jlora.cli.arguments import parse
from jlora.cli.flags import flags_of
from jlora.cli.foreign_config import NAMES
from jlora.errors import UsageError
from train import Arguments

TRL = """
model_name_or_path: m
dataset_name: d
use_peft: true
lora_r: 8
per_device_train_batch_size: 2
output_dir: out
"""


def refused(file) -> str:
    with pytest.raises(UsageError) as error:
        parse(Arguments, ["--config", str(file)])
    return str(error.value)


def test_every_name_is_one_of_train_py():
    assert set(NAMES.values()) <= set(flags_of(Arguments))


@pytest.mark.parametrize(
    ("name", "tool", "said", "rest"),
    [
        (
            "axolotl.yml",
            "Axolotl",
            ["base_model is model", "lora_r is lora.r", "bf16 is compute.dtype"],
            "adapter, special_tokens",
        ),
        (
            "llamafactory.yaml",
            "LLaMA-Factory",
            ["lora_rank is lora.r", "cutoff_len is data.seq_len"],
            "stage, do_train, finetuning_type, template",
        ),
    ],
)
def test_file_of_another_tool_is_recognised(name, tool, said, rest):
    message = refused(GOLDEN / "field" / name)
    assert f"{name}: a configuration of {tool}, which jlora does not read" in message
    for text in said:
        assert text in message
    assert f"without a counterpart: {rest};" in message


def test_file_of_trl_is_recognised(tmp_path):
    (tmp_path / "trl.yaml").write_text(TRL)
    message = refused(tmp_path / "trl.yaml")
    assert "a configuration of TRL or Transformers" in message
    assert "dataset_name is data.train" in message


def test_one_key_of_another_tool_is_a_mistyped_key(tmp_path):
    (tmp_path / "run.yaml").write_text("model: m\noutput_dir: o\nlora_rank: 8\n")
    assert "unknown key 'lora_rank'" in refused(tmp_path / "run.yaml")


def test_all_unknown_keys_are_listed(tmp_path):
    keys = [f"unknown{i}" for i in range(40)]
    (tmp_path / "run.yaml").write_text("".join(f"{key}: 1\n" for key in keys))
    message = refused(tmp_path / "run.yaml")
    assert all(key in message for key in keys)


FLAGS = {
    "--lr": "--optim.learning_rate",
    "--temp": "--temperature",
    "--seq_len": "--data.seq_len",
    "--max_length": "--data.seq_len",
    "--compute.base_dtype": "--base_dtype",
    "--system-prompt": "--system",
    "--n": "--num_return_sequences",
    "--top-p": "--top_p",
    "--max-iters": "--train.max_steps",
    "--random_state": "--seed",
    "--use_gradient_checkpointing": "--compute.remat",
    "--max-seq-length": "--data.seq_len",
    "--iters": "--train.max_steps",
    "--epochs": "--train.num_epochs",
    "--dataset": "--data.train",
    "--data": "--data.train",
    "--per_device_train_batch_size": "--train.batch_size",
    "--batch-size": "--train.batch_size",
    "--model_name_or_path": "--model",
    "--max_tokens": "--max_new_tokens",
    "--adapter-path": "--adapter",
    "--bf16": "--compute.dtype",
}


@pytest.mark.parametrize(("theirs", "ours"), FLAGS.items())
def test_a_flag_of_another_tool_or_command_is_answered_with_its_name_here(theirs, ours):
    commands = [train.Arguments, generate.Arguments, evaluate.Arguments]
    has = [command for command in commands if ours[2:] in flags_of(command)]
    assert has
    for command in has:
        if theirs[2:] not in flags_of(command):
            with pytest.raises(UsageError, match=f"{theirs}; did you mean {ours}\\?"):
                parse(command, [theirs, "1"])
