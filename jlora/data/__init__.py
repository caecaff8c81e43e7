"""Records to fixed-shape batches; the only owner of tokenizers and jinja2.

Nothing here imports JAX, which processes that tokenise would wait a second for.
"""

from jlora.data.batches import Dataset
from jlora.data.dataset import load_dataset, load_split
from jlora.data.jsonl import RowError
from jlora.data.preview import make_samples, plan_lines
from jlora.data.tokenizer import Tokenizer

__all__ = [
    "Dataset",
    "RowError",
    "Tokenizer",
    "load_dataset",
    "load_split",
    "make_samples",
    "plan_lines",
]
