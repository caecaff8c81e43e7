"""adapter_config.json: PEFT's settings, read strictly and written with the fewest keys.

Source: PEFT 0.21 `tuners/lora/config.py`.
"""

import re
from dataclasses import fields
from typing import Any

from jlora.config.lora_config import (
    PLAIN_METHODS,
    RESIDUAL_METHODS,
    UNRECORDED_METHODS,
    LoraConfig,
    unsupported_fields,
)
from jlora.errors import (
    CorruptError,
    UnsupportedError,
    UsageError,
    listing,
    nearest,
    warn,
)
from jlora.formats.peft.adapter import Adapter
from jlora.formats.tensor_names import module_name
from jlora.lora.adapter_tree import EMBEDDING, HEAD
from jlora.lora.target_modules import VOCAB_MODULES, is_saved

MERGE_FIRST = (
    "merge it with PEFT (merge_and_unload) where it was trained, save the model and use "
    "that as the base instead"
)


def read_config(document: dict[str, Any], where: str) -> LoraConfig:
    """Returns the settings of an adapter_config.json; absent keys take PEFT's defaults."""
    if document.get("peft_type") is None:
        raise CorruptError(f"{where}: no peft_type, so not a PEFT adapter's settings")
    refused = unsupported_fields(document)
    if refused:
        raise UnsupportedError(
            f"{where}: jlora does not support {listing(refused)}; {MERGE_FIRST}"
        )
    known = LoraConfig.__dataclass_fields__  # unlike `fields`, with init-only ones
    unknown = [
        f"{key}{nearest(key, known)}" for key in sorted(document) if key not in known
    ]
    if unknown:
        warn(f"{where}: unknown keys are ignored: {listing(unknown)}")
    # A null stands for PEFT's default.
    given: dict[str, Any] = {
        item.name: document[item.name]
        for item in fields(LoraConfig)
        if document.get(item.name) is not None
    }
    given["init_lora_weights"] = _initialisation(
        document.get("init_lora_weights"), where
    )
    try:
        return LoraConfig(**given)
    except UsageError as error:
        raise CorruptError(f"{where}: {error}") from error


def _initialisation(method: Any, where: str) -> bool | str:
    """Returns pissa or olora, on which the base depends; True for what left it unchanged.

    Raises:
        UnsupportedError: a method that changed the base, and the change is not known.
        CorruptError: not a method of PEFT's.
    """
    method = method.lower() if isinstance(method, str) else method
    if method is None or method in PLAIN_METHODS:
        return True
    if method in UNRECORDED_METHODS or str(method).startswith("pissa_niter"):
        raise UnsupportedError(
            f"{where}: init_lora_weights={method!r} is not supported, as the adapter "
            "does not say how it changed its base; save it as plain LoRA with PEFT: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=INITIAL)"
        )
    if method not in RESIDUAL_METHODS:
        raise CorruptError(
            f"{where}: init_lora_weights={method!r} is not known to PEFT"
        )
    return method


def config_to_write(adapter: Adapter, linears: list[str] | None) -> dict[str, Any]:
    """Returns the document of a plain LoRA adapter, for every PEFT since 0.6.

    Those releases fail on unknown keys, so newer keys are only written if they are set.

    Args:
        adapter: what is written.
        linears: HF names of all linear layers of the base, if they are known.
    """
    config, pairs = adapter.config, adapter.pairs
    ranks = {module_name(path): x["lora_A"].shape[1] for path, x in pairs.items()}
    alphas = {
        module_name(path): _alpha(config, x["lora_A"].shape[1], adapter.scalings[path])
        for path, x in pairs.items()
    }
    newer = {
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "ensure_weight_tying": config.ensure_weight_tying,
        "trainable_token_indices": config.trainable_token_indices,
    }
    return {
        "alpha_pattern": {
            re.escape(name): _as_integer(alpha)
            for name, alpha in alphas.items()
            if alpha != config.lora_alpha
        },
        "auto_mapping": None,
        "base_model_name_or_path": config.base_model_name_or_path,
        "bias": config.bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": _as_integer(config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "modules_to_save": sorted(config.modules_to_save or []) or None,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": {
            re.escape(name): rank for name, rank in ranks.items() if rank != config.r
        },
        "target_modules": _shortest_targets(config, sorted(ranks), linears),
        "revision": config.revision,
        "task_type": "CAUSAL_LM",
        **{key: value for key, value in newer.items() if value},
    }


def _shortest_targets(
    config: LoraConfig, names: list[str], linears: list[str] | None
) -> list[str]:
    """Returns sorted suffixes if they select the same modules, else sorted full names."""
    if config.ensure_weight_tying and EMBEDDING in names:  # PEFT then adds the head
        names = [name for name in names if name != HEAD]
    suffixes = sorted({name.rsplit(".")[-1] for name in names})
    if linears:
        selected = [
            name
            for name in {*linears, *VOCAB_MODULES}
            if name.rsplit(".")[-1] in suffixes and not is_saved(config, name)
        ]
        return suffixes if sorted(selected) == names else names
    # The base is not known. Targets without a dot and without limits mean every layer.
    targets = config.target_modules
    if isinstance(targets, str):
        uniform = targets.lower() == "all-linear"
    else:
        uniform = targets is None or not any("." in target for target in targets)
    limited = config.exclude_modules or config.layers_to_transform not in (None, [])
    return suffixes if uniform and not limited else names


def _alpha(config: LoraConfig, rank: int, scaling: float) -> float:
    """Returns the alpha of the settings that gives this scaling, without rounding."""
    given = (config.lora_alpha, *config.alpha_pattern.values())
    return next(alpha for alpha in given if config.scaling(rank, alpha) == scaling)


def _as_integer(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else alpha
