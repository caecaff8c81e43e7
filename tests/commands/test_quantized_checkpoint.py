"""Commands on a checkpoint of bitsandbytes, against the same weights dequantised."""

import json

import numpy as np
import pytest
from helpers.commands import HF_CONFIG, call, losses, succeed, train_flags
from helpers.data_cases import make_files
from helpers.quantized_files import bnb_model, plain_model
from helpers.tiny import write_hf

pytestmark = pytest.mark.usefixtures("in_workdir")
CONFIG = HF_CONFIG | {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders: all projections in nf4, some of them plain, and each dequantised."""
    folder = tmp_path_factory.mktemp("bnb")
    made = {"nf4": bnb_model(config=CONFIG)}
    made["mixed"] = bnb_model(config=CONFIG, plain=("layers.0.mlp", "1.self_attn.q"))
    made |= {f"plain {name}": plain_model(*model) for name, model in made.items()}
    for name, model in made.items():
        write_hf(folder / name, *model)
        for file, data in make_files().items():
            (folder / name / file).write_bytes(data)
    return folder


def trained(out, model, *flags: object) -> list[float]:
    succeed(
        "train", *train_flags(out, "--train.max_steps", 3, "--model", model, *flags)
    )
    return losses(out)


@pytest.mark.parametrize("remat", ["none", "full", "offload"])
@pytest.mark.parametrize("name", ["nf4", "mixed"])
def test_losses_are_those_of_the_dequantised_weights(models, tmp_path, name, remat):
    found = trained(tmp_path / "a", models / name, "--compute.remat", remat)
    expected = trained(tmp_path / "b", models / f"plain {name}")
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_nf4_of_the_dequantised_weights_trains_the_same(models, tmp_path):
    found = trained(tmp_path / "a", models / "nf4")
    again = trained(tmp_path / "b", models / "plain nf4", "--compute.base_dtype", "nf4")
    assert found == again


def test_converted_evaluated_generated_and_merged(models, tmp_path):
    base, run, out = tmp_path / "base", tmp_path / "run", tmp_path / "out"
    succeed("convert.from_hf", models / "mixed", base)
    assert "nf4: the layers' projections" in succeed("convert.info", base)
    flags = ("--data", "eval.jsonl", "--data.seq_len", 64)
    own, plain = (
        float(succeed("evaluate", "--model", model, *flags).split()[1])
        for model in (base, models / "plain mixed")
    )
    assert own == pytest.approx(plain, abs=5e-6)
    words = ("--prompt", "a", "--max_new_tokens", 4)
    assert call("generate", "--model", base, *words).status == 0
    trained(run, base)
    told = succeed("convert.to_hf", "--model", models / "mixed", "--adapter", run, out)
    assert f"merged onto {models / 'mixed'} as it is dequantised from nf4" in told
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert "no" in succeed("convert.info", out)
    merged, adapted = (
        float(succeed("evaluate", *words, *flags).split()[1])
        for words in (
            ("--model", out),
            ("--model", models / "mixed", "--adapter", run),
        )
    )
    # The merged weights are rounded to bfloat16.
    assert merged == pytest.approx(adapted, rel=5e-3)


def test_another_format_is_a_usage_error(models, tmp_path):
    flags = ("--model", models / "nf4", "--compute.base_dtype", "int8")
    status, _, err = call("train", *train_flags(tmp_path / "run", *flags))
    assert status == 2
    assert "quantised as nf4 already, and cannot become int8" in err
