"""Records to fixed-shape batches; the only owner of tokenizers and jinja2."""

from jlora.data.batches import Dataset
from jlora.data.dataset import load_dataset, load_split
from jlora.data.jsonl import RowError
from jlora.data.prefetch import Prefetch
from jlora.data.preview import make_samples, plan_lines
from jlora.data.tokenizer import Tokenizer

__all__ = [
    "Dataset",
    "Prefetch",
    "RowError",
    "Tokenizer",
    "load_dataset",
    "load_split",
    "make_samples",
    "plan_lines",
]
