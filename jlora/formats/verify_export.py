"""Checks that an exported model computes what base and adapter compute."""

import math
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
from jlora.lora.adapter_tree import Params, map_leaves
from jlora.lora.merging import merge
from jlora.model.llama import Llama

ROWS, LENGTH = 2, 32
# Comparing the logits of a larger model takes minutes; the bytes are compared anyway.
MAX_PARAMETERS = 1_000_000_000
# Limits of |difference| / largest |logit|. The same weights give the same logits. Merging
# in float32 changes the order of summation: 3e-5 on SmolLM2-135M. Rounded weights change
# more, as layers amplify the error: float16 2e-3, bfloat16 and Q8_0 5e-2 on that model.
EXACT = 1e-3
ROUNDED = {"float32": EXACT, "float16": 2e-2, "bfloat16": 2e-1, "Q8_0": 2e-1}


def is_verified(source: ModelSource, wanted: bool | None) -> bool:
    """Returns whether to compare the logits; None: if the model is small."""
    if wanted is not None:
        return wanted
    parameters = sum(math.prod(spec.shape) for spec in source.tensors.values())
    return parameters < MAX_PARAMETERS


def verify_export(source: ModelSource, adapter: Adapter, path: Path) -> str:
    """Compares the logits of base+adapter, merged in memory and read from what was written.

    Args:
        source: the base.
        adapter: the adapter.
        path: the merged folder or GGUF file.

    Returns:
        A line for the user with the largest differences, and the mean KL divergence per
        token of the merged model from base+adapter in nats.

    Raises:
        CorruptError: the differences are larger than rounding explains.
    """
    reloaded = open_model(str(path))
    params = attach_adapter(
        load_params(source, dtype="float32"), source.config, adapter
    )
    unmerged = _logits(adapted_config(adapter, source.config), params)
    params = map_leaves(
        lambda path, leaf: leaf.astype(reloaded.tensors["/".join(path)].dtype),
        merge(params),
    )
    in_memory = _logits(reloaded.config, params)
    del params  # one model at a time
    from_disk = _logits(reloaded.config, load_params(reloaded))
    largest = float(np.abs(unmerged).max())
    stored = {spec.dtype.name for spec in reloaded.tensors.values()}
    # Blocks are read as float32, so what is merged in memory is not rounded like them.
    blocks = ROUNDED.keys() & reloaded.provenance.get("tensor_types", {}).keys()
    stored |= blocks
    coarsest = max(stored, key=ROUNDED.__getitem__)
    allowed = ROUNDED[coarsest] * largest
    to_files = _distance(unmerged, from_disk)
    merged_to_files = _distance(in_memory, from_disk)
    line = (
        f"largest logit difference: base+adapter to merged "
        f"{_distance(unmerged, in_memory):.2e}, to the files {to_files:.2e}, "
        f"merged to the files {merged_to_files:.2e} (logits up to "
        f"{largest:.1f}, {coarsest} allows {allowed:.2e}); "
        f"mean KL {_mean_kl(unmerged, from_disk):.2e}"
    )
    # So that NaN, which is above and below nothing, does not agree.
    same = allowed if blocks else EXACT * largest
    if not (merged_to_files <= same and to_files <= allowed):
        raise CorruptError(
            f"{path}: not the model of base and adapter, nothing was exported; {line}"
        )
    return line


def _logits(config: LlamaConfig, params: Params) -> np.ndarray:
    """Returns float64 logits; products are in float32, whatever dtype the weights have."""
    length = min(LENGTH, config.longest)
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
