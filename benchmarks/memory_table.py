"""Writes two tables of what `--plan` says of Llama from 1B to 70B.

That of README.md has the memory of a step; that of docs/performance.md says which base and
which remat fit a card.

    python benchmarks/memory_table.py

Needs no GPU and no weights: the sizes follow from each model's config.json.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlora.config.llama_config import LlamaConfig
from jlora.config.lora_config import LoraConfig
from jlora.config.run_config import ComputeConfig, MeshConfig
from jlora.formats.load_params import BaseDtype, abstract_params
from jlora.formats.model_source import ModelSource
from jlora.formats.safetensors_file import Spec
from jlora.formats.tensor_names import all_names
from jlora.lora.initialisation import add_lora
from jlora.parallel.described_devices import described_devices
from jlora.parallel.sharding import make_mesh
from jlora.train.memory_estimate import USABLE_SHARE, memory_bytes, plan_workload

ROOT = Path(__file__).parents[1]
README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"
BEGIN, END = (
    "<!-- memory: made by benchmarks/memory_table.py -->",
    "<!-- end of memory -->",
)
ROWS, LENGTH = 1, 4096
RANKS = (16, 64)
COLUMNS: dict[str, tuple[BaseDtype, str]] = {
    "bf16, `minimal`": ("bfloat16", "minimal"),
    "bf16, `full`": ("bfloat16", "full"),
    "bf16, `offload`": ("bfloat16", "offload"),
    "int8 or fp8, `minimal`": ("int8", "minimal"),
    "nf4, `minimal`": ("nf4", "minimal"),
    "nf4, `full`": ("nf4", "full"),
}
# From the most exact to the least, and of one format from the fastest.
SETTINGS: list[tuple[BaseDtype, str]] = [
    (dtype, remat)
    for dtype in ("bfloat16", "int8", "nf4")
    for remat in ("minimal", "full", "offload")
]
NAMES = {"bfloat16": "bf16", "int8": "int8 or fp8", "nf4": "nf4"}
# GiB that cards are sold with as GB. Drivers and programs leave less, as the plan assumes.
CARDS = (8, 16, 24, 48, 80, 141)
# hidden_size, intermediate_size, layers, heads, kv heads, tied
MODELS = {
    "Llama 3.2 1B": (2048, 8192, 16, 32, 8, True),
    "Llama 3.2 3B": (3072, 8192, 28, 24, 8, True),
    "Llama 3.1 8B": (4096, 14336, 32, 32, 8, False),
    "Llama 2 13B": (5120, 13824, 40, 40, 40, False),
    "Llama 3.1 70B": (8192, 28672, 80, 64, 8, False),
}


def config_of(name: str) -> LlamaConfig:
    """Returns the model's configuration, as its config.json has it."""
    hidden, mlp, layers, heads, kv_heads, tied = MODELS[name]
    return LlamaConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 64 if name == "Llama 3.2 1B" else 128,
            "vocab_size": 32000 if name == "Llama 2 13B" else 128256,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": tied,
        }
    )


def base_of(config: LlamaConfig, dtype: BaseDtype) -> dict[str, Any]:
    """Returns the shapes of the base's parameters, stored in `dtype`."""
    bfloat16 = np.dtype(jax.numpy.bfloat16)
    tensors = {name.path: Spec(name.shape, bfloat16) for name in all_names(config)}
    source = ModelSource("hf", Path(), config, {}, tensors, _read_nothing, {}, {})
    return abstract_params(source, dtype=dtype)


def _read_nothing(path: str, box: Any = None) -> np.ndarray:
    raise AssertionError(f"{path}: the plan reads no weights")


def planned_gib(config: LlamaConfig, rank: int, dtype: BaseDtype, remat: Any) -> float:
    """Returns the sum that `--plan` prints for one step, in GiB."""
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    base = base_of(config, dtype)
    params = jax.eval_shape(lambda base: add_lora(base, lora, jax.random.key(0)), base)
    compute = ComputeConfig(remat=remat)
    one_gpu = make_mesh(MeshConfig(), described_devices("h200"))
    work = plan_workload(
        config, params, one_gpu, compute=compute, rows=ROWS, length=LENGTH
    )
    return sum(memory_bytes(params, work).values()) / 2**30


def row(name: str, rank: int) -> str:
    """Returns a line of the table, in Markdown."""
    cells = [
        f"{planned_gib(config_of(name), rank, dtype, remat):.1f}"
        for dtype, remat in COLUMNS.values()
    ]
    return f"| {name} | {rank} | {' | '.join(cells)} |"


def card_row(name: str) -> str:
    """Returns what fits each card: the most exact setting, and a faster one if there is."""
    config = config_of(name)
    needs = {setting: planned_gib(config, 16, *setting) for setting in SETTINGS}
    return f"| {name} | {' | '.join(_fitting(needs, card) for card in CARDS)} |"


def _fitting(needs: dict[tuple[BaseDtype, str], float], card: int) -> str:
    limit = USABLE_SHARE * card
    fitting = [setting for setting in SETTINGS if needs[setting] <= limit]
    if not fitting:
        return "-"
    # int8 and fp8 are the fastest, if nothing more is recomputed for them.
    codes = [x for x in fitting if x == ("int8", "minimal")]
    chosen = dict.fromkeys([fitting[0], *codes])
    return "; ".join(
        f"{NAMES[dtype]} `{remat}` {needs[dtype, remat]:.1f}" for dtype, remat in chosen
    )


def main() -> None:
    """Replaces the tables between their marks."""
    head = ["model", "rank", *COLUMNS]
    write(README, head, [row(name, rank) for name in MODELS for rank in RANKS])
    head = ["model", *(f"{card} GB" for card in CARDS)]
    write(PERFORMANCE, head, [card_row(name) for name in MODELS])


def write(file: Path, head: list[str], rows: list[str]) -> None:
    """Replaces the table of a document."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows]
    text = file.read_text("utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    file.write_text("\n".join([f"{before}{BEGIN}", *lines, f"{END}{after}"]), "utf-8")


if __name__ == "__main__":
    main()
