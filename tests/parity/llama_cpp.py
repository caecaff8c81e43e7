"""Merged exports, read by the converter of llama.cpp and back.

    python tests/parity/llama_cpp.py LLAMA_CPP --model BASE

LLAMA_CPP is a checkout (or the vendor/llama.cpp of the source package of
llama-cpp-python). Prints what its converter warns of, and whether every tensor of the
GGUF file is bit for bit that of the export. Needs the environment of `make parity` and
sentencepiece; `--model BASE` is where the tokenizer comes from.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import llamas
import torch
from peft import LoraConfig, get_peft_model

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from convert import to_hf
from jlora.cli.command import run_command
from jlora.formats.model_source import read_as
from jlora.formats.open_model import open_model


def export(folder: Path, name: str, tokenizer: list[Path]) -> Path:
    """Returns the merged folder of a small random model and a random adapter."""
    model = llamas.save(folder / "hf", name)
    for file in tokenizer:
        shutil.copy(file, folder / "hf")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.05)
    adapted.save_pretrained(folder / "adapter")
    words = [str(folder / "merged"), "--model", str(folder / "hf")]
    words += ["--adapter", str(folder / "adapter"), "--verify", "false"]
    assert not run_command(to_hf.main, to_hf.Arguments, argv=words)
    return folder / "merged"


def to_gguf(llama_cpp: Path, folder: Path) -> tuple[Path, list[str]]:
    """Returns the file that llama.cpp's converter makes, and its warnings."""
    out = folder.with_suffix(".gguf")
    script = llama_cpp / "convert_hf_to_gguf.py"
    command = [sys.executable, script, folder, "--outtype", "f32", "--outfile", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, [line for line in done.stderr.splitlines() if "WARNING" in line]


def main() -> None:
    """Prints a line for each configuration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    arguments = parser.parse_args()
    tokenizer = sorted(arguments.model.glob("tokenizer*"))
    llamas.PLAIN.update(vocab_size=49152, bos_token_id=1, eos_token_id=2)
    for name in llamas.CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            merged = export(Path(folder), name, tokenizer)
            file, warnings = to_gguf(arguments.llama_cpp, merged)
            if name == "longrope":  # of a Llama it writes no factors
                print(f"{name}: {warnings}")
                continue
            ours, theirs = (open_model(str(path)) for path in (merged, file))
            pairs = (
                [read_as(source, path, "float32") for source in (ours, theirs)]
                for path in ours.tensors
            )
            same = ours.tensors.keys() == theirs.tensors.keys() and all(
                a.tobytes() == b.tobytes() for a, b in pairs
            )
            rope = ours.config.rope_parameters == theirs.config.rope_parameters
            print(f"{name}: tensors identical: {same}, rope: {rope}, {warnings}")
            assert same


if __name__ == "__main__":
    main()
