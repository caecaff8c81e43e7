import dataclasses
import json
from typing import Any

import jsonschema
import pytest
from helpers import ROOT

import evaluate
import train
from jlora.cli.arguments import parse
from jlora.cli.command import run_command
from jlora.cli.flags import flags_of
from jlora.cli.json_schema import json_schema
from jlora.cli.strict_yaml import read_yaml

FILE = ROOT / "docs" / "config.schema.json"
TRAIN = jsonschema.Draft7Validator(json_schema(train.Arguments))
EVALUATE = jsonschema.Draft7Validator(json_schema(evaluate.Arguments))
EXAMPLES = sorted(ROOT.glob("examples/*.yaml"))


def test_the_file_is_what_jlora_train_prints(capsys):
    assert run_command(print, train.Arguments, argv=["--schema"]) == 0
    message = "renew it: python docs/make_configuration.py"
    assert capsys.readouterr().out == FILE.read_text("utf-8"), message


def test_it_is_a_schema_with_the_meaning_and_default_of_every_flag():
    jsonschema.Draft7Validator.check_schema(TRAIN.schema)
    properties = json_schema(train.Arguments)["properties"]
    for flag in flags_of(train.Arguments).values():
        assert properties[flag.key].get("description", "") == flag.help
        if not (flag.is_required or flag.is_hidden):
            assert properties[flag.key]["default"] == flag.default
            TRAIN.validate({flag.key: flag.default})


@pytest.mark.parametrize(
    "document",
    [
        {"model": "m", "optim": {"learning_rate": 1}, "lora.r": 16, "train": None},
        {"lora": {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}}},
        {"data": {"train": {"a.jsonl": 2.0}, "eval": "b.jsonl"}},
        {"compute": {"base_dtype": "nf4"}, "lora": {"task_type": "CAUSAL_LM"}},
        {"mesh": "auto", "data": "packing"},
    ],
)
def test_what_a_file_may_say_is_valid(document):
    TRAIN.validate(document)


@pytest.mark.parametrize(
    "document",
    [
        {"lr": 1e-4},
        {"optim": {"lr": 1e-4}},
        {"optim.lr": 1e-4},
        {"optim": {"learning_rate": "fast"}},
        {"compute": {"base_dtype": "nf3"}},
        {"lora": {"r": 1.5}},
        {"lora": 8},
        {"mesh": "automatic"},
        {"mesh": "fsdp"},
        {"compute": "auto"},
        {"train": {"keep_best": "yes"}},
        {"data": {"train": [1.5]}},
    ],
)
def test_a_wrong_key_or_value_is_not(document):
    with pytest.raises(jsonschema.ValidationError):
        TRAIN.validate(document)


@pytest.mark.parametrize("data", ["a.jsonl", {"a.jsonl": 2}, {"seq_len": 64}])
def test_data_of_evaluate_is_a_file_or_a_group(data):
    EVALUATE.validate({"data": data})
    with pytest.raises(jsonschema.ValidationError):
        EVALUATE.validate({"data": {"seq_len": "long"}})


def test_a_run_s_own_file_is_valid(tmp_path):
    args: Any = parse(train.Arguments, ["--model", "m", "--output_dir", "o"])
    TRAIN.validate(json.loads(json.dumps(dataclasses.asdict(args))))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_every_example_is_valid_and_names_the_schema(file):
    first = file.read_text("utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=../docs/config.schema.json"
    TRAIN.validate(read_yaml(file))
