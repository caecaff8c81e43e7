from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from helpers.commands import adapter_bytes, evaluated_loss, generated, succeed

pytestmark = pytest.mark.usefixtures("in_workdir")


@pytest.fixture(scope="module")
def merged(workdir, run) -> Path:
    out = workdir / "merged"
    succeed("convert.to_hf", "--model", workdir / "hf", "--adapter", run, out)
    return out


def test_the_merged_folder_gives_the_loss_of_base_and_adapter(merged):
    assert evaluated_loss("--model", merged) == pytest.approx(
        evaluated_loss("--model", "hf", "--adapter", "run"), abs=2e-6
    )


def test_the_peft_folder_holds_the_runs_adapter(run, tmp_path):
    succeed("convert.to_peft", "--adapter", run, tmp_path / "peft")
    exported = safetensors.numpy.load_file(
        tmp_path / "peft" / "adapter_model.safetensors"
    )
    trained = safetensors.numpy.load(adapter_bytes(run))
    assert len(trained) == 28  # A and B of seven projections in two layers
    assert exported.keys() == trained.keys()
    assert all(np.array_equal(exported[key], trained[key]) for key in trained)


def test_exports_are_the_same_bytes_twice(run, merged, tmp_path):
    again = tmp_path / "merged"
    succeed("convert.to_hf", "--model", "hf", "--adapter", run, again)
    files = sorted(path.name for path in merged.iterdir())
    assert {"config.json", "model.safetensors"} <= set(files)
    assert files == sorted(path.name for path in again.iterdir())
    assert all((merged / f).read_bytes() == (again / f).read_bytes() for f in files)


def test_merged_and_adapted_models_generate_the_same(merged):
    flags = ["--prompt", "What is a", "--max_new_tokens", 8]
    assert generated("--model", merged, *flags) == generated(
        "--model", "hf", "--adapter", "run", *flags
    )


def test_info_says_what_a_base_is(base):
    out = succeed("convert.info", base)
    assert "2 layers of 32" in out
    assert "content digest" in out


def test_converting_twice_gives_the_same_digest(base, tmp_path):
    out = succeed("convert.from_hf", "hf", tmp_path / "again")
    digest = next(line for line in out.splitlines() if "digest" in line)
    assert len(digest.split()[-1]) >= 32
    assert digest in succeed("convert.info", base)
