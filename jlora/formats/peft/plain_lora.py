"""PiSSA and OLoRA adapters: their initial A0 and B0, and their form as plain LoRA.

Both methods compute A0 and B0 from a weight W and subtract s A0 B0 from it. PEFT's files
therefore only fit this residual base. A plain LoRA adapter of twice the rank has the same
effect on W itself.
"""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jlora.formats.open_model import open_model
from jlora.formats.peft.adapter import Adapter, Tensors
from jlora.formats.peft.adapter_keys import EMBED_PATH
from jlora.formats.peft.named_base import open_named_base
from jlora.formats.tensor_names import module_name, module_path
from jlora.lora.adapter_tree import HEAD
from jlora.lora.initialisation import needs_residual_base, principal_factors


def initial_factors(adapter: Adapter, name: str, weight: Any) -> dict[str, Any]:
    """Returns lora_A0 and lora_B0 of a module, computed from its weight as PEFT does.

    Empty if the adapter leaves this weight as it is.
    """
    path = module_path(name)
    is_adapted = "lora_A" in adapter.tensors.get(path, {})
    if not needs_residual_base(adapter.config) or not is_adapted or path == EMBED_PATH:
        return {}
    a, b = principal_factors(
        str(adapter.config.init_lora_weights),
        weight,
        jax.random.key(0),  # not used by the methods that `read_adapter` accepts
        rank=adapter.tensors[path]["lora_A"].shape[1],
        scaling=adapter.scalings[path],
    )
    return {"lora_A0": a, "lora_B0": b}


def plain_lora(adapter: Adapter) -> Adapter:
    """Returns the adapter as plain LoRA; for PiSSA and OLoRA this opens its base.

    Raises:
        UsageError: the base is needed, and the settings do not name it.
        JloraError: the base cannot be opened.
    """
    if not needs_residual_base(adapter.config):
        return adapter
    why = f"init_lora_weights={adapter.config.init_lora_weights!r}"
    source = open_named_base(adapter, open_model, why)
    initial: Tensors = {}
    for path in adapter.pairs:
        if path != EMBED_PATH:
            tied = path == HEAD and source.config.tie_word_embeddings
            weight = source.read(
                f"{EMBED_PATH}/embedding" if tied else f"{path}/kernel"
            )
            factors = initial_factors(
                adapter, module_name(path), weight.T if tied else weight
            )
            initial[path] = {leaf: np.asarray(x) for leaf, x in factors.items()}
    return with_initial_factors(adapter, initial)


def with_initial_factors(adapter: Adapter, initial: Tensors) -> Adapter:
    """Returns a plain LoRA adapter of twice the rank whose update is s (A B - A0 B0).

    Its factors are [A, A0] and [B, -B0]. A module without A0 and B0, as the embedding, is
    padded with zeros.

    Args:
        adapter: A and B after training.
        initial: params path -> lora_A0 and lora_B0.
    """
    tensors: Tensors = {}
    for path, leaves in adapter.tensors.items():
        tensors[path] = dict(leaves)
        if "lora_A" not in leaves:
            continue
        a, b = leaves["lora_A"], leaves["lora_B"]
        factors = initial.get(path, {"lora_A0": 0 * a, "lora_B0": 0 * b})
        tensors[path]["lora_A"] = np.concatenate([a, factors["lora_A0"]], axis=1)
        tensors[path]["lora_B"] = np.concatenate([b, -factors["lora_B0"]], axis=0)
    config = adapter.config
    alpha = 2**0.5 if config.use_rslora else 2
    doubled = replace(
        config,
        r=2 * config.r,
        lora_alpha=alpha * config.lora_alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: alpha * x for key, x in config.alpha_pattern.items()},
        init_lora_weights=True,
    )
    return Adapter.make(doubled, tensors, adapter.location, adapter.has_own_embeddings)
