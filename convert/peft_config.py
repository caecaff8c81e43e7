"""adapter_config.json: PEFT's settings, read strictly and written minimally.

Source: PEFT 0.21 `tuners/lora/config.py`.
"""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from jlora.config import UNSUPPORTED_LORA_FIELDS, LoraConfig
from jlora.errors import CorruptError, UnsupportedError, UsageError, listing, nearest
from jlora.targets import TABLES, is_saved

MERGE_FIRST = (
    "merge it with PEFT (merge_and_unload) where it was trained, save the model and use "
    "that as the base instead"
)
# Starting points that leave the base alone: what comes out of training is plain LoRA.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "mica", "eva")
# Those that take the start out of the base, and can be computed again from it.
_RESIDUAL_INITS = ("pissa", "olora")
_LOST_INITS = ("corda", "loftq", "lora_ga")
# Bookkeeping, settings of other starting points and of other layer types.
_IGNORED = {
    "auto_mapping",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
}
_READ = {
    "base_model_name_or_path",
    "init_lora_weights",
    "peft_type",
    "revision",
    "task_type",
}


def read_config(document: dict[str, Any], where: str) -> LoraConfig:
    """Returns the settings of an adapter_config.json; absent keys take PEFT's defaults."""
    kind, task = document.get("peft_type"), document.get("task_type")
    if kind is None:
        raise CorruptError(f"{where}: no peft_type, so not a PEFT adapter's settings")
    if kind != "LORA" or task not in (None, "CAUSAL_LM"):
        raise UnsupportedError(
            f"{where}: peft_type={kind!r}, task_type={task!r}; jlora supports LORA for "
            f"CAUSAL_LM only; {MERGE_FIRST}"
        )
    refused = [
        f"{key}={document[key]!r}"
        for key, neutral in UNSUPPORTED_LORA_FIELDS.items()
        if key in document and document[key] not in neutral
    ]
    if refused:
        raise UnsupportedError(
            f"{where}: jlora does not support {listing(refused)}; {MERGE_FIRST}"
        )
    init = document.get("init_lora_weights", True)
    init = init.lower() if isinstance(init, str) else init
    if init in _LOST_INITS or str(init).startswith("pissa_niter"):
        raise UnsupportedError(
            f"{where}: init_lora_weights={init!r} is not supported, as the adapter does "
            "not tell its changed base; save it as plain LoRA with PEFT: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=INITIAL)"
        )
    if init not in (*_PLAIN_INITS, *_RESIDUAL_INITS):
        raise CorruptError(f"{where}: init_lora_weights={init!r} is not known to PEFT")
    known = {
        field.name for field in fields(LoraConfig)
    } | UNSUPPORTED_LORA_FIELDS.keys()
    known |= _IGNORED | _READ
    unknown = [
        f"{key}{nearest(key, known)}" for key in sorted(document) if key not in known
    ]
    if unknown:
        warn(f"{where}: unknown keys are ignored: {listing(unknown)}")
    honoured = {key: document[key] for key in _FORMS if document.get(key) is not None}
    _check_forms(document, honoured, where)
    # A plain start says nothing once training is over.
    if init in _RESIDUAL_INITS:
        honoured["init_lora_weights"] = init
    try:
        return LoraConfig(**honoured)
    except UsageError as error:
        raise CorruptError(f"{where}: {error}") from error


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    )


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and _is_names(value)


def _is_tokens(value: Any) -> bool:
    lists = value.values() if isinstance(value, dict) else [value]
    return all(isinstance(x, list) and all(map(_is_int, x)) for x in lists)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_indices(value: Any) -> bool:
    return all(_is_int(i) for i in (value if isinstance(value, list) else [value]))


def _is_number(value: Any) -> bool:
    return _is_int(value) or isinstance(value, float)


# The honoured fields with the forms they may have; LoraConfig checks the ranges.
_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_int, "an integer"),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (_is_number, "a number"),
    "target_modules": (_is_names, "a string or a list of strings"),
    "exclude_modules": (_is_names, "a string or a list of strings"),
    "layers_to_transform": (_is_indices, "an integer or a list of integers"),
    "layers_pattern": (_is_names, "a string or a list of strings"),
    "rank_pattern": (lambda value: isinstance(value, dict), "an object"),
    "alpha_pattern": (lambda value: isinstance(value, dict), "an object"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "use_dora": (lambda value: isinstance(value, bool), "true or false"),
    "ensure_weight_tying": (lambda value: isinstance(value, bool), "true or false"),
    "modules_to_save": (_is_list_of_names, "a list of strings"),
    "trainable_token_indices": (
        _is_tokens,
        "a list of token ids, or an object of such",
    ),
    "bias": (lambda value: isinstance(value, str), "a string"),
}


def _check_forms(
    document: Mapping[str, Any], honoured: Mapping[str, Any], where: str
) -> None:
    wrong = [
        f"{key}={value!r} is not {_FORMS[key][1]}"
        for key, value in honoured.items()
        if not _FORMS[key][0](value)
    ]
    wrong += [
        f"{key}={document[key]!r} is not a string"
        for key in ("base_model_name_or_path", "revision")
        if not isinstance(document.get(key), str | None)
    ]
    if wrong:
        raise CorruptError(f"{where}: {listing(wrong)}")


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
