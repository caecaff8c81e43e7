"""Proof that an exported model computes what base and adapter compute."""

from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jlora.config.llama_config import LlamaConfig
from jlora.errors import CorruptError
from jlora.formats.load_params import load_params
from jlora.formats.model_source import ModelSource
from jlora.formats.open_model import open_model
from jlora.formats.peft.attach_adapter import Adapter, attach_adapter, model_config
from jlora.formats.tensor_names import Params
from jlora.lora.adapter_tree import map_leaves
from jlora.lora.merging import merge
from jlora.model.llama import Llama

ROWS, LENGTH = 2, 32
# Allowed |difference| over the largest |logit|. The same weights differ by nothing; in
# float32, merging changes the order of summation (3e-5 on SmolLM2-135M). Narrow files
# round every weight, which layers amplify: float16 2e-3, bfloat16 5e-2 on that model.
EXACT = 1e-3
ROUNDED = {"float32": EXACT, "float16": 2e-2, "bfloat16": 2e-1}


@dataclass(frozen=True)
class Figures:
    """How far three forms of one model are apart, in logits and nats."""

    largest_logit: float
    adapter_to_memory: float
    """Largest |difference|: base with adapter, and merged in memory and rounded."""
    adapter_to_disk: float
    """Largest |difference|: base with adapter, and the folder read back."""
    memory_to_disk: float
    """Largest |difference|: merged in memory, and the folder read back."""
    mean_kl: float
    """Mean KL divergence per token of the folder's model from base with adapter."""
    dtype: str
    """The coarsest dtype of the folder's tensors."""

    @property
    def allowed(self) -> float:
        """The largest `adapter_to_disk` that rounding explains."""
        return ROUNDED[self.dtype] * self.largest_logit

    @property
    def agree(self) -> bool:
        """Whether the three forms are one model."""
        return (
            self.memory_to_disk <= EXACT * self.largest_logit
            and self.adapter_to_disk <= self.allowed
        )

    def __str__(self) -> str:
        """One line for the log."""
        return (
            f"largest logit difference: base+adapter to merged "
            f"{self.adapter_to_memory:.2e}, to the files {self.adapter_to_disk:.2e}, "
            f"merged to the files {self.memory_to_disk:.2e} (logits up to "
            f"{self.largest_logit:.1f}, {self.dtype} allows {self.allowed:.2e}); "
            f"mean KL {self.mean_kl:.2e}"
        )


def check(source: ModelSource, adapter: Adapter, folder: Path) -> Figures:
    """Returns the figures of a merged folder.

    Raises:
        CorruptError: the folder computes something else than base and adapter.
    """
    figures = compare(source, adapter, folder)
    if not figures.agree:
        raise CorruptError(
            f"{folder}: not the model of base and adapter, nothing was exported; {figures}"
        )
    return figures


def compare(source: ModelSource, adapter: Adapter, folder: Path) -> Figures:
    """Runs a few rows of tokens through base+adapter, merged in memory and from disk."""
    config = source.config
    reloaded = open_model(str(folder))
    params = attach_adapter(load_params(source, dtype="float32"), config, adapter)
    unmerged = _logits(model_config(adapter, config), params)
    params = map_leaves(
        lambda path, leaf: leaf.astype(reloaded.tensors["/".join(path)].dtype),
        merge(params),
    )
    in_memory = _logits(reloaded.config, params)
    del params  # one model at a time
    from_disk = _logits(reloaded.config, load_params(reloaded))
    stored = {spec.dtype.name for spec in reloaded.tensors.values()}
    return Figures(
        largest_logit=float(np.abs(unmerged).max()),
        adapter_to_memory=_distance(unmerged, in_memory),
        adapter_to_disk=_distance(unmerged, from_disk),
        memory_to_disk=_distance(in_memory, from_disk),
        mean_kl=_mean_kl(unmerged, from_disk),
        dtype=max(stored, key=ROUNDED.__getitem__),
    )


def _logits(config: LlamaConfig, params: Params) -> np.ndarray:
    """Returns float64 logits; products in float32 whatever the weights' dtype."""
    length = min(LENGTH, config.max_position_embeddings)
    random = np.random.default_rng(0)
    tokens = random.integers(0, config.vocab_size, (ROWS, length), np.int32)
    # Not jitted: three runs of a few tokens take less time than one compilation.
    model = Llama(config, dtype=jnp.dtype("float32"))
    logits = model.apply({"params": params}, jnp.asarray(tokens))
    return np.asarray(logits, np.float64)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


def _mean_kl(a: np.ndarray, b: np.ndarray) -> float:
    log_p, log_q = _log_softmax(a), _log_softmax(b)
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
