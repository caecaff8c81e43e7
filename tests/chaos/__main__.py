"""The long form: `make chaos`. It takes about half an hour and ends with 1 if one is wrong."""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path

from helpers import ROOT

from chaos.damage import (
    adapter_content,
    base_content,
    cached_content,
    continued_adapter,
    damage_all,
)
from chaos.kills import STEPS, kill_training, kill_writing
from chaos.lab import Lab

# Inputs made to execute, explode or confuse; their tests are those of the suite.
HOSTILE = (
    *("tests/data/chat", "tests/data/tokenize", "tests/data/test_data_fuzz.py"),
    *("tests/formats/test_fuzz.py", "tests/lora/test_target_modules.py"),
    "tests/test_limited_process.py",
)


def main() -> int:
    """Runs all experiments and prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    seed = parser.parse_args().seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        settle(Path(folder))
        lab = Lab(Path(folder), seed)
        began = time.monotonic()
        try:
            for experiment in (kill_everything, damage_everything, give_hostile_input):
                experiment(lab)
                took = time.monotonic() - began
                print(f"{experiment.__name__}: {took:.0f} s", flush=True)
        finally:  # also of a part
            lab.print_table()
    return 1 if lab.wrong else 0


def settle(folder: Path) -> None:
    """Keeps caches in the folder, and JAX on one CPU device."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JLORA_CACHE": str(folder / "default-cache"),
        "PYTHONWARNINGS": "ignore",  # JAX's, of being forked; no thread has begun yet
    }
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def kill_everything(lab: Lab) -> None:
    """Kills train, save, export and convert, one process and two."""
    kill_training(lab, 56)
    kill_training(lab, 6, count=2)
    bf16 = ("--dtype", "bfloat16")
    kill_writing(lab, 16, "convert.from_hf", lambda out: ["hf", out], *bf16)
    adapter = ("--adapter", "whole1")
    merge = ("--model", "hf", *adapter)
    kill_writing(lab, 16, "convert.to_hf", lambda out: [out, *merge], *bf16)
    vllm = ("--for", "vllm")
    kill_writing(lab, 8, "convert.to_peft", lambda out: [out, *adapter], *vllm)


def damage_everything(lab: Lab) -> None:
    """Damages every file of a base, a token cache and a run."""
    base = lab.folder / "new-convert.from_hf"
    damage_all(lab, "base", base, base_content)
    damage_all(lab, "token cache", lab.folder / "cache", partial(cached_content, lab))
    run = lab.folder / "whole1"
    stopped, before = (lab.folder / name for name in ("stopped", "before"))
    shutil.copytree(run / "checkpoints", stopped / "checkpoints")
    shutil.copytree(stopped, before)
    shutil.rmtree(before / "checkpoints" / str(STEPS))
    with contextlib.chdir(lab.folder):
        older = adapter_content(before)
        damage_all(lab, "finished run, read", run, adapter_content)
        damage_all(lab, "stopped run, read", stopped, adapter_content, older=older)
        # As many as take some minutes.
        resume = partial(continued_adapter, lab)
        damage_all(lab, "run, continued", run, resume, most=50)


def give_hostile_input(lab: Lab) -> None:
    """Runs the suite's tests of hostile templates, tokenizers, expressions and files."""
    report = lab.folder / "hostile.xml"
    words = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *HOSTILE]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        failed = case.find("failure") is not None or case.find("error") is not None
        outcome = done.stdout[-2000:] if failed else "refused"
        lab.count("hostile input, tests", outcome, case.get("name"))


if __name__ == "__main__":
    sys.exit(main())
