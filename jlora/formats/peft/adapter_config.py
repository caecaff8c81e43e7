"""adapter_config.json: PEFT's settings, read strictly and written minimally.

Source: PEFT 0.21 `tuners/lora/config.py`.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from jlora.config.lora_config import LoraConfig
from jlora.config.peft_fields import (
    INERT,
    LOST_STARTS,
    PLAIN_STARTS,
    REFUSED,
    RESIDUAL_STARTS,
    unsupported,
)
from jlora.errors import CorruptError, UnsupportedError, UsageError, listing, nearest
from jlora.lora.target_modules import TABLES, is_saved

MERGE_FIRST = (
    "merge it with PEFT (merge_and_unload) where it was trained, save the model and use "
    "that as the base instead"
)


def read_config(document: dict[str, Any], where: str) -> LoraConfig:
    """Returns the settings of an adapter_config.json; absent keys take PEFT's defaults."""
    if document.get("peft_type") is None:
        raise CorruptError(f"{where}: no peft_type, so not a PEFT adapter's settings")
    refused = unsupported(document)
    if refused:
        raise UnsupportedError(
            f"{where}: jlora does not support {listing(refused)}; {MERGE_FIRST}"
        )
    kept = {item.name for item in fields(LoraConfig)}
    known = {*kept, *REFUSED, *INERT}
    unknown = [
        f"{key}{nearest(key, known)}" for key in sorted(document) if key not in known
    ]
    if unknown:
        warn(f"{where}: unknown keys are ignored: {listing(unknown)}")
    start = _start(document.get("init_lora_weights"), where)
    given = {key: document[key] for key in kept if document.get(key) is not None}
    try:
        return LoraConfig(**{**given, "init_lora_weights": start})
    except UsageError as error:
        raise CorruptError(f"{where}: {error}") from error


def _start(start: Any, where: str) -> bool | str:
    """Returns the start that a trained adapter still depends on, true for none.

    Raises:
        UnsupportedError: one that changed the base in a way the adapter does not tell.
        CorruptError: none of PEFT's.
    """
    start = start.lower() if isinstance(start, str) else start
    if start is None or start in PLAIN_STARTS:
        return True
    if start in LOST_STARTS or str(start).startswith("pissa_niter"):
        raise UnsupportedError(
            f"{where}: init_lora_weights={start!r} is not supported, as the adapter does "
            "not tell its changed base; save it as plain LoRA with PEFT: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=INITIAL)"
        )
    if start not in RESIDUAL_STARTS:
        raise CorruptError(f"{where}: init_lora_weights={start!r} is not known to PEFT")
    return start


def warn(text: str) -> None:
    """Prints a warning for what still works."""
    print(f"warning: {text}", file=sys.stderr)


def config_to_write(
    config: LoraConfig,
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
    linears: list[str] | None,
) -> dict[str, Any]:
    """Returns the keys that every PEFT since 0.6 knows; an older one stops at others.

    Args:
        config: what the adapter was trained with.
        ranks: HF module name -> rank, of every adapted module.
        scalings: HF module name -> scaling, of the same modules.
        linears: HF names of the base's linear layers, if they are known.
    """
    alphas = {name: _alpha(config, ranks[name], scalings[name]) for name in ranks}
    return {
        "alpha_pattern": {
            re.escape(name): _plain(alpha)
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
        "lora_alpha": _plain(config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "modules_to_save": sorted(config.modules_to_save or []) or None,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": {
            re.escape(name): rank for name, rank in ranks.items() if rank != config.r
        },
        "target_modules": _targets(config, sorted(ranks), linears),
        "revision": config.revision,
        "task_type": "CAUSAL_LM",
        **{key: value for key, value in _newer(config).items() if value},
    }


def _newer(config: LoraConfig) -> dict[str, Any]:
    """Returns the keys that only newer releases know, written only where they say more."""
    return {
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "ensure_weight_tying": config.ensure_weight_tying,
        "trainable_token_indices": config.trainable_token_indices,
    }


def _targets(
    config: LoraConfig, names: list[str], linears: list[str] | None
) -> list[str]:
    """Returns sorted suffixes if they select the same modules, else sorted full names."""
    if config.ensure_weight_tying and TABLES[0] in names:  # its head follows by itself
        names = [name for name in names if name != TABLES[1]]
    suffixes = sorted({name.rsplit(".")[-1] for name in names})
    if linears:
        every = {*linears, *TABLES}
        matched = [
            name
            for name in every
            if name.rsplit(".")[-1] in suffixes and not is_saved(config, name)
        ]
        return suffixes if sorted(matched) == names else names
    # Without the base, the settings decide: plain suffixes reach every layer.
    targets = config.target_modules
    if isinstance(targets, str):
        uniform = targets.lower() == "all-linear"
    else:
        uniform = targets is None or not any("." in target for target in targets)
    limited = config.exclude_modules or config.layers_to_transform not in (None, [])
    return suffixes if uniform and not limited else names


def _alpha(config: LoraConfig, rank: int, scaling: float) -> float:
    """Returns the alpha exactly as given, not as scaling times rank."""
    given = (config.lora_alpha, *config.alpha_pattern.values())
    return next(alpha for alpha in given if config.scaling(rank, alpha) == scaling)


def _plain(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else alpha
