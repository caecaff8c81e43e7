"""Checks that an exported model computes what base and adapter compute."""

from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jlora.config.llama_config import LlamaConfig
from jlora.errors import CorruptError
from jlora.formats.load_params import load_params
from jlora.formats.model_source import ModelSource
from jlora.formats.open_model import open_model
from jlora.formats.peft.adapter import Adapter
from jlora.formats.peft.adapter_placement import adapted_config
from jlora.formats.peft.attach_adapter import attach_adapter
from jlora.formats.tensor_names import Params
from jlora.lora.adapter_tree import map_leaves
from jlora.lora.merging import merge
from jlora.model.llama import Llama

ROWS, LENGTH = 2, 32
# Limits of |difference| / largest |logit|. The same weights give the same logits. Merging
# in float32 changes the order of summation: 3e-5 on SmolLM2-135M. Rounded weights change
# more, as layers amplify the error: float16 2e-3, bfloat16 5e-2 on that model.
EXACT = 1e-3
ROUNDED = {"float32": EXACT, "float16": 2e-2, "bfloat16": 2e-1}


@dataclass(frozen=True)
class Differences:
    """How far three forms of one model are apart, in logits and nats."""

    largest_logit: float
    adapter_to_memory: float
    """Largest |difference| of base+adapter and the model merged in memory."""
    adapter_to_disk: float
    """Largest |difference| of base+adapter and the folder read back."""
    memory_to_disk: float
    """Largest |difference| of the model merged in memory and the folder read back."""
    mean_kl: float
    """Mean KL divergence per token of the folder's model from base+adapter."""
    dtype: str
    """The dtype of the folder's tensors with the largest rounding error."""

    @property
    def allowed(self) -> float:
        """The largest `adapter_to_disk` that rounding explains."""
        return ROUNDED[self.dtype] * self.largest_logit

    @property
    def are_small(self) -> bool:
        """Whether rounding explains all differences."""
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


def verify_export(source: ModelSource, adapter: Adapter, folder: Path) -> Differences:
    """Returns how far a merged folder is from base and adapter.

    Raises:
        CorruptError: further than rounding explains.
    """
    differences = compare(source, adapter, folder)
    if not differences.are_small:
        raise CorruptError(
            f"{folder}: not the model of base and adapter, nothing was exported; "
            f"{differences}"
        )
    return differences


def compare(source: ModelSource, adapter: Adapter, folder: Path) -> Differences:
    """Runs random tokens through base+adapter, merged in memory and read from disk."""
    config = source.config
    reloaded = open_model(str(folder))
    params = attach_adapter(load_params(source, dtype="float32"), config, adapter)
    unmerged = _logits(adapted_config(adapter, config), params)
    params = map_leaves(
        lambda path, leaf: leaf.astype(reloaded.tensors["/".join(path)].dtype),
        merge(params),
    )
    in_memory = _logits(reloaded.config, params)
    del params  # one model at a time
    from_disk = _logits(reloaded.config, load_params(reloaded))
    stored = {spec.dtype.name for spec in reloaded.tensors.values()}
    return Differences(
        largest_logit=float(np.abs(unmerged).max()),
        adapter_to_memory=_distance(unmerged, in_memory),
        adapter_to_disk=_distance(unmerged, from_disk),
        memory_to_disk=_distance(in_memory, from_disk),
        mean_kl=_mean_kl(unmerged, from_disk),
        dtype=max(stored, key=ROUNDED.__getitem__),
    )


def _logits(config: LlamaConfig, params: Params) -> np.ndarray:
    """Returns float64 logits; products are in float32, whatever dtype the weights have."""
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
