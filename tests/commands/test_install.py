"""The installed program: the wheel in an environment of its own, outside the checkout."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from helpers.commands import train_flags

from jlora.cli.jlora_command import COMMANDS

# What makes --help slow if it is imported before the flags are read.
HEAVY = "flax huggingface_hub jax jinja2 numpy optax orbax tensorstore tokenizers"
IMPORTED = f"""
import sys
from jlora.cli.jlora_command import main
try:
    main(sys.argv[1:])
finally:
    print("imported:", sorted(set("{HEAVY}".split()) & set(sys.modules)))
"""


def call(*words: object, **settings: Any) -> str:
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=300, **settings
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    call(
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "-t",
        "wheel",
        "-d",
        folder,
        cwd=ROOT,
    )
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The program `jlora`; the dependencies are those of the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("env")
    call(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    pip = ["-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    call(sys.executable, *pip, wheel)
    paths = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    file = Path(paths.strip()) / "dependencies.pth"
    file.write_text(sysconfig.get_path("purelib"))
    return folder / "bin" / "jlora"


def test_the_wheel_installs_no_other_top_level_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        assert {f"jlora/commands/{m}.py" for m in COMMANDS.values()} <= {
            *archive.namelist()
        }
    assert tops == {"jlora", "jlora-0.1.0.dist-info"}


def test_the_program_lists_its_commands_and_its_version(installed, tmp_path):
    lines = call(installed, "--help", cwd=tmp_path).splitlines()
    assert lines[0] == "usage: jlora COMMAND ..."
    assert [line.split()[0] for line in lines if line[:3].strip(" ")] == [
        "usage:",
        *COMMANDS,
        "jlora",
    ]
    assert call(installed, "--version", cwd=tmp_path) == "jlora 0.1.0\n"


@pytest.mark.slow
def test_convert_train_and_export_beside_files_of_the_same_names(
    installed, workdir, tmp_path
):
    for name in ("train", "convert", "generate", "from_hf", "jax"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong file')")
    for name in ("hf", "train.jsonl"):
        (tmp_path / name).symlink_to(workdir / name)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def jlora(*words: object) -> str:
        return call(installed, *words, cwd=tmp_path, env=env)

    assert "content digest" in jlora("convert", "hf", "base")
    words = [word if word != "hf" else "base" for word in train_flags("run")]
    jlora("train", *words, "--train.max_steps", 2)
    jlora("export", "--model", "base", "--adapter", "run", "merged")
    jlora("export", "--to", "vllm", "--adapter", "run", "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert "content digest" in jlora("info", "base")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "words", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join
)
def test_help_does_not_wait_for_jax(words):
    out = call(sys.executable, "-c", IMPORTED, *words, cwd=ROOT)
    assert out.splitlines()[-1] == "imported: []"


def test_the_library_is_imported_without_jax():
    code = "import jlora, sys; print({*sys.argv[1:]} & set(sys.modules))"
    assert call(sys.executable, "-c", code, *HEAVY.split(), cwd=ROOT) == "set()\n"
