"""Writes the table of measured errors in docs/conversion.md.

`python tests/parity/measure.py`, in the environment of `make parity`.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "parity")]

import conftest  # noqa: E402, F401
import jax.numpy as jnp  # noqa: E402
import llamas  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import convert  # noqa: E402

DOCUMENT = ROOT / "docs" / "conversion.md"
BEGIN = "<!-- errors: made by tests/parity/measure.py -->\n"
END = "<!-- end of errors -->\n"
WHAT = {
    "mha": "8 heads, 8 kv heads",
    "gqa": "8 heads, 2 kv heads",
    "mqa": "8 heads, 1 kv head",
    "biases": "attention_bias, mlp_bias",
    "attention_bias": "attention_bias alone",
    "mlp_bias": "mlp_bias alone, eps 1e-5",
    "head_dim": "head_dim 20, hidden / heads = 8",
    "llama3": "rope llama3",
    "tied": "tied embeddings",
    **{name: f"rope {name}" for name in llamas.ROPES},
}
VARIANTS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "8 heads, 2 kv heads, stored in float16": ("gqa", torch.float16, {}),
    "8 heads, 2 kv heads, stored in bfloat16": ("gqa", torch.bfloat16, {}),
    "in shards, with an index": ("mha", torch.float32, {"max_shard_size": "100KB"}),
}


def error(name: str, dtype: Any, options: dict[str, Any]) -> tuple[float, float]:
    """Returns the largest |difference| and the largest |logit|."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = llamas.save(Path(folder), name, dtype, **options)
        model, params = convert.load(folder)
    tokens = llamas.random_tokens()
    expected = llamas.torch_logits(theirs, tokens)
    found: Any = model.apply({"params": params}, jnp.asarray(tokens))
    difference = np.abs(np.asarray(found) - expected).max()
    return float(difference), float(np.abs(expected).max())


def main() -> None:
    """Measures every configuration and rewrites the table."""
    cases = {WHAT[name]: (name, torch.float32, {}) for name in llamas.CONFIGS}
    lines = ["| configuration | largest difference | logits up to |", "|---|---|---|"]
    for what, case in {**cases, **VARIANTS}.items():
        difference, largest = error(*case)
        lines.append(f"| {what} | {difference:.1e} | {largest:.1f} |")
        print(lines[-1], flush=True)
    before, rest = DOCUMENT.read_text("utf-8").split(BEGIN)
    after = rest.split(END)[1]
    text = before + BEGIN + "\n".join(lines) + "\n" + END + after
    DOCUMENT.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
