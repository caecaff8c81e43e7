"""What jlora makes of each field of PEFT's LoraConfig: the one place that judges them.

A field is honoured (`FORMS` says which values it may have), inert (`INERT`: bookkeeping,
or without effect on a Llama), or refused unless it is at rest (`REFUSED`). Settings
from Python, from flags and from an adapter_config.json all come through here.

Source: PEFT 0.21 `tuners/lora/config.py`, `config.py`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jlora.config.json_fields import is_int
from jlora.errors import listing


@dataclass(frozen=True)
class Form:
    """Which values a field may have; ranges are checked where the value is used."""

    words: str
    holds: Callable[[Any], bool]
    is_optional: bool = True


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or _is_list_of_names(value)


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_indices(value: Any) -> bool:
    return all(map(is_int, value if isinstance(value, list) else [value]))


def _is_tokens(value: Any) -> bool:
    lists = value.values() if isinstance(value, dict) else [value]
    return all(isinstance(ids, list) and _is_indices(ids) for ids in lists)


def _is_pattern(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_real(value: Any) -> bool:
    return is_int(value) or isinstance(value, float)


_NAMES = Form("a string or a list of strings", _is_names)
_PATTERN = Form("an object of regular expressions", _is_pattern)
_TEXT = Form("a string", lambda value: isinstance(value, str))
_BOOLEAN = Form(
    "true or false", lambda value: isinstance(value, bool), is_optional=False
)
FORMS: dict[str, Form] = {
    "r": Form("an integer", is_int, is_optional=False),
    "lora_alpha": Form("a number", _is_real, is_optional=False),
    "lora_dropout": Form("a number", _is_real, is_optional=False),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_to_transform": Form("an integer or a list of integers", _is_indices),
    "layers_pattern": _NAMES,
    "rank_pattern": _PATTERN,
    "alpha_pattern": _PATTERN,
    "use_rslora": _BOOLEAN,
    "use_dora": _BOOLEAN,
    "init_lora_weights": Form(
        "true, false or a string", lambda x: isinstance(x, bool | str), False
    ),
    "modules_to_save": Form("a list of strings", _is_list_of_names),
    "trainable_token_indices": Form(
        "a list of token ids, or an object of such", _is_tokens
    ),
    "ensure_weight_tying": _BOOLEAN,
    "bias": Form("a string", _TEXT.holds, is_optional=False),
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
}
# The values that change nothing, and what others would ask for.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "peft_type": ((None, "LORA"), "jlora has LoRA only"),
    "task_type": ((None, "CAUSAL_LM"), "jlora has models with a language head only"),
    "lora_bias": ((False, None), "jlora has no bias on lora_B"),
    "layer_replication": (
        (None, []),
        "it makes another model out of the base's layers",
    ),
    "target_parameters": ((None, []), "a Llama's weights all belong to modules"),
    "alora_invocation_tokens": ((None,), "jlora has no activated LoRA"),
    "arrow_config": ((None,), "jlora does not route between adapters"),
    "use_bdlora": ((None, False), "jlora has no block-diagonal LoRA"),
    "velora_config": ((None,), "jlora has no VeLoRA"),
    "kasa_config": ((None,), "jlora has no KaSA"),
    "monteclora_config": ((None,), "jlora has no MonteCLoRA"),
    "use_qalora": ((False, None), "jlora has no QALoRA"),
}
# Bookkeeping, settings of other starts (which init_lora_weights asks for) and of other
# types of layers.
INERT = (
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
    "runtime_config",
)
# Starts that leave the base alone: what comes out of training is plain LoRA.
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "mica", "eva")
# Those that take the start out of the base, and can be computed again from it.
RESIDUAL_STARTS = ("pissa", "olora")
# Those after which the adapter does not tell its base.
LOST_STARTS = ("corda", "loftq", "lora_ga")
# Those that a new adapter may have, beside pissa_niter_N.
NEW_STARTS = (True, False, "gaussian", "orthogonal", "pissa", "olora")
_PISSA_NITER = re.compile(r"pissa_niter_[1-9]\d*")
_WHY_NOT = {
    "mica": "it freezes lora_B",
    "eva": "it needs the data's activations",
    "corda": "it needs the data's activations",
    "lora_ga": "it needs the data's gradients",
    "loftq": "it replaces the base by a quantised one",
}


def normalised(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the honoured fields with lists for tuples and sets, and objects for null."""
    result = {}
    for key, value in values.items():
        if isinstance(value, tuple | range):
            value = list(value)
        elif isinstance(value, set | frozenset):
            value = sorted(value, key=lambda item: (str(type(item)), item))
        elif value is None and FORMS[key] is _PATTERN:
            value = {}
        elif key == "init_lora_weights" and isinstance(value, str):
            value = value.lower()
        result[key] = value
    return result


def malformed(values: Mapping[str, Any]) -> list[str]:
    """Returns a phrase for each honoured field whose value is not of its form."""
    return [
        f"{key}={value!r:.80} is not {FORMS[key].words}"
        for key, value in values.items()
        if not (FORMS[key].is_optional and value is None)
        and not FORMS[key].holds(value)
    ]


def unsupported(values: Mapping[str, Any]) -> list[str]:
    """Returns a phrase for each field that asks for what jlora does not do."""
    return [
        f"{key}={values[key]!r:.80} ({why})"
        for key, (neutral, why) in REFUSED.items()
        if key in values and values[key] not in neutral
    ]


def unsupported_start(start: bool | str) -> str | None:
    """Returns why a new adapter cannot start so, or None if it can."""
    if start in NEW_STARTS or _PISSA_NITER.fullmatch(str(start)):
        return None
    why = _WHY_NOT.get(str(start), "it is not known")
    return (
        f"init_lora_weights={start!r} ({why}); jlora starts adapters as true, false, "
        f"{listing(NEW_STARTS[2:])} and pissa_niter_N"
    )
