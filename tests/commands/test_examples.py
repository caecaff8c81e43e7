"""Every file of examples/ is a whole run: with a tiny model, few steps and these devices."""

import re

import pytest
from helpers import ROOT
from helpers.commands import make_model, metrics, succeed

from jlora.cli.strict_yaml import read_yaml

EXAMPLES = sorted(ROOT.glob("examples/*.yaml"))
# Sizes alone: every other setting is the file's.
SIZES = {
    "train.max_steps": 2,
    "train.batch_size": 8,
    "train.grad_accum_steps": 1,
    "lora.r": 2,
}
OWN = {
    "several-gpus": {"train.batch_size": 16, "train.grad_accum_steps": 2},
    "sweep": {"mesh.data": 1},
    "tools": {"mesh.data": 1, "data.seq_len": 1024},  # a token is a character
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose chat template knows tools."""
    folder = tmp_path_factory.mktemp("examples") / "hf"
    small = {"num_hidden_layers": 1, "max_position_embeddings": 1024}
    return make_model(folder, "llama31", **small)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_a_run(file, model, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = read_yaml(file)
    sizes = {**SIZES, "data.seq_len": 512, **OWN.get(file.stem, {})}
    flags = [word for key, value in sizes.items() for word in (f"--{key}", value)]
    run = tmp_path / "run"
    place = ("--config", file, "--model", model, "--output_dir", run)
    out = succeed("train", *place, *flags)
    names = list(read_yaml(ROOT / given["sweep"])) if "sweep" in given else [""]
    for name in names:
        assert (run / name / "adapter" / "adapter_config.json").is_file()
        steps = [m for m in metrics(run / name) if "loss" in m]
        assert [m["step"] for m in steps] == [1, 2]
        assert all(m["supervised_tokens"] for m in steps)
    assert "cut" not in out


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_says_how_it_is_run(file):
    command = f"jlora train --config {file.relative_to(ROOT)}"
    lines = file.read_text("utf-8").splitlines()
    assert any(line.startswith("#     ") and command in line for line in lines)


def test_memory_that_an_example_names_is_what_the_documents_plan():
    documents = (ROOT / "README.md").read_text() + (
        ROOT / "docs" / "performance.md"
    ).read_text()
    for name, model, forms in (
        ("8b-nf4-24gb", "Llama 3.1 8B", ("minimal", "full")),
        ("70b-nf4-80gb", "Llama 3.1 70B", ("full",)),
    ):
        text = (ROOT / "examples" / f"{name}.yaml").read_text()
        named = re.findall(r"([\d.]+) GiB with (?:remat )?(\w+)", text)
        assert [form for _, form in named] == list(forms)
        row = re.search(rf"^\| {model} \| 16 \|.*$", documents, re.M)
        assert row is not None
        *_, minimal, full = [cell.strip() for cell in row[0].strip("| ").split("|")]
        planned = {"minimal": minimal, "full": full}
        assert [(planned[form], form) for form in forms] == named
