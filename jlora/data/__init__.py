"""Records to fixed-shape batches; the only owner of tokenizers and jinja2.

Nothing here imports JAX, which processes that tokenise would wait a second for.
"""

from jlora.data.batch.batches import Dataset
from jlora.data.batch.dataset import load_dataset, load_split
from jlora.data.batch.preview import make_samples, plan_lines
from jlora.data.read.jsonl import RowError
from jlora.data.tokenize.tokenizer import Tokenizer

__all__ = [
    "Dataset",
    "RowError",
    "Tokenizer",
    "load_dataset",
    "load_split",
    "make_samples",
    "plan_lines",
]
