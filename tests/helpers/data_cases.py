"""Tokenizers and data sets that several tests of the data pipeline make."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers import GOLDEN
from jlora.config.llama_config import LlamaConfig
from jlora.config.rope_config import RopeParameters
from jlora.config.run_config import DataConfig
from jlora.data.batch.batches import Dataset
from jlora.data.batch.load_dataset import load_dataset
from jlora.data.cache.build_cache import make_block
from jlora.data.cache.token_store import TokenStore
from jlora.data.read.splits import TO_TRAIN
from jlora.data.tokenize.tokenize_rows import Example
from jlora.data.tokenize.tokenizer import Tokenizer

GOLDEN = GOLDEN / "chat"
TEMPLATES = json.loads((GOLDEN / "cases.json").read_text())["templates"]
CONFIG = LlamaConfig(
    vocab_size=400,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_parameters=RopeParameters(rope_theta=10000.0),
    max_position_embeddings=128,
)
CHATML = TEMPLATES["chatml"]["template"]


def make_files(name: str = "chatml", **settings: Any) -> dict[str, bytes]:
    """A model's files with the tokenizer and template `name`; settings override."""
    case = TEMPLATES[name]
    merged = {
        "bos_token": case["bos_token"],
        "eos_token": case["eos_token"],
        "chat_template": case["template"],
        **settings,
    }
    return {
        "tokenizer.json": (GOLDEN / f"{case['tokenizer']}.json").read_bytes(),
        "tokenizer_config.json": json.dumps(merged).encode(),
    }


def make_tokenizer(name: str = "chatml", **settings: Any) -> Tokenizer:
    return Tokenizer(make_files(name, **settings), CONFIG)


def render(tokenizer: Tokenizer, messages, tools=None, **options: bool) -> str:
    """The text of a conversation."""
    template = tokenizer.template(tools)
    return template.render(template.prepare(messages, tools), **options).text


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    """Writes JSONL; strings and bytes are written as they are."""
    with path.open("wb") as file:
        for row in rows:
            raw = row.encode() if isinstance(row, str) else row
            file.write(raw if isinstance(raw, bytes) else json.dumps(raw).encode())
            file.write(b"\n")
    return path


def load(
    path: Path | dict[str, float],
    tokenizer: Tokenizer | None = None,
    *,
    vocab_size: int = 500,
    batch_size: int = 2,
    seed: int = 0,
    shuffle: bool = False,
    splits: Sequence[str] = TO_TRAIN,
    **config: Any,
) -> Dataset:
    return load_dataset(
        path,
        tokenizer or make_tokenizer(),
        DataConfig(**config),
        vocab_size=vocab_size,
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        splits=splits,
    )


def chat(*contents: str) -> dict[str, Any]:
    """A messages record: user and assistant in turns."""
    roles = ("user", "assistant")
    return {
        "messages": [
            {"role": roles[i % 2], "content": text} for i, text in enumerate(contents)
        ]
    }


def dataset_of(
    examples: Sequence[Example], *, seq_len: int = 64, packing: bool = True
) -> Dataset:
    """Shuffled batches of four rows from examples that no file holds."""
    block = make_block(examples)
    store = TokenStore(block.tokens, block.loss_mask, block.records, note={}, digest="")
    return Dataset(
        store,
        block.records["start"],
        block.records["length"],
        num_supervised=int(block.records["supervised"].sum()),
        seq_len=seq_len,
        packing=packing,
        batch_size=4,
        pad_id=0,
        seed=0,
        shuffle=True,
    )


def all_tokens(data: Dataset) -> list[int]:
    """The tokens of every record, one after the other."""
    return [t for i in range(data.num_records) for t in data.record(i)[0].tolist()]


def all_masks(data: Dataset) -> list[int]:
    """The loss masks of `all_tokens`."""
    return [m for i in range(data.num_records) for m in data.record(i)[1].tolist()]


UNSTABLE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content | upper }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}"
)


def field_files(name: str, **settings: Any) -> dict[str, bytes]:
    """Tokenizer files with <think> and <|python_tag|>: "llama31" or "r1_distill"."""
    folder = GOLDEN.parent / "field"
    merged = json.loads((folder / f"{name}.json").read_text()) | settings
    return {
        "tokenizer.json": (folder / "tokenizer.json").read_bytes(),
        "tokenizer_config.json": json.dumps(merged).encode(),
    }
