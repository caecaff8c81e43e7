"""The settings of an adapter: `LoraConfig`, with PEFT's field names, defaults and meanings.

All fields of PEFT's LoraConfig are listed here, once: settings from Python, from flags and
from an adapter_config.json are all checked against this class.

Source: PEFT 0.21 `tuners/lora/config.py`, `config.py`.
"""

# ruff: noqa: RUF009  `_only` returns a dataclass field
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import Field, InitVar, dataclass, field, fields
from typing import Any, no_type_check

from jlora.config.field_types import has_type, type_in_words
from jlora.config.json_fields import is_number, joined
from jlora.errors import UnsupportedError, UsageError, listing

# No Llama is wider than this, so a larger rank is a mistake.
MAX_RANK = 65536
# Outside of these the scaling is no use in float32.
_ALPHAS = 1e-9, 1e9

# Values of init_lora_weights for a new adapter; pissa_niter_N is one, too.
NEW_METHODS = (True, False, "gaussian", "orthogonal", "pissa", "olora")
_PISSA_NITER = re.compile(r"pissa_niter_[1-9]\d*")
# Values that leave the base model alone: the trained adapter is plain LoRA.
PLAIN_METHODS = (True, False, "gaussian", "orthogonal", "mica", "eva")
# Values that subtract the initial update from the base, from which it can be recomputed.
RESIDUAL_METHODS = ("pissa", "olora")
# Values that change the base in a way that the files of an adapter do not record.
UNRECORDED_METHODS = ("corda", "loftq", "lora_ga")
_WHY_NOT_NEW = {
    "mica": "it freezes lora_B",
    "eva": "it needs the data's activations",
    "corda": "it needs the data's activations",
    "lora_ga": "it needs the data's gradients",
    "loftq": "it replaces the base by a quantised one",
}


def _only(default: Any, *others: Any, why: str) -> Any:
    """Returns a field of PEFT's that jlora accepts with these values only, and why."""
    return field(default=default, metadata={"values": (default, *others), "why": why})


@no_type_check  # by the tests' import hook: __post_init__ tells users what is wrong
@dataclass(frozen=True)
class LoraConfig:
    """The adapter; field names, defaults and meanings as in PEFT's LoraConfig."""

    r: int = 8
    """Rank of the update."""
    lora_alpha: float = 8
    """Numerator of the scaling: the update is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout probability of the input of lora_A, in training only."""
    target_modules: list[str] | str | None = None
    """Ends of module names, one regular expression, or all-linear; null: q_proj and v_proj."""
    exclude_modules: list[str] | str | None = None
    """Modules that get no adapter, as ends of names or one regular expression."""
    layers_to_transform: list[int] | int | None = None
    """Indices of the layers that get an adapter; null: all."""
    layers_pattern: list[str] | str | None = None
    """Name of the list of layers that layers_to_transform counts in; null: found by itself."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Regular expression -> rank, for modules whose rank is not r."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Regular expression -> alpha, for modules whose alpha is not lora_alpha."""
    use_rslora: bool = False
    """Multiply the update by lora_alpha / sqrt(r) instead (rank-stabilised LoRA)."""
    use_dora: bool = False
    """Also train the norm of every output's weights (DoRA, weight-decomposed LoRA)."""
    init_lora_weights: bool | str = True
    """Initial values: true (A uniform, B zero), false (both uniform), gaussian, orthogonal,
    pissa, pissa_niter_N or olora."""
    modules_to_save: list[str] | None = None
    """Ends of names of modules to train in full, such as lm_head."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Token ids whose rows of the embedding are trained, or module name -> ids."""
    ensure_weight_tying: bool = False
    """On a tied base: what is trained on the embedding serves the head, too."""
    bias: str = "none"
    """Which biases an adapter contains (all, lora_only); training does not change them."""
    base_model_name_or_path: str | None = None
    """Where readers of the adapter find its base model; null: as --model."""
    revision: str | None = None
    """Revision of that base model on the hub."""

    # PEFT's other fields are checked and not kept. Those without a reason have no effect
    # on a plain LoRA of a Llama.
    peft_type: InitVar[Any] = _only(None, "LORA", why="jlora has LoRA only")
    task_type: InitVar[Any] = _only(
        None, "CAUSAL_LM", why="jlora has models with a language head only"
    )
    auto_mapping: InitVar[Any] = None
    peft_version: InitVar[Any] = None
    inference_mode: InitVar[bool] = False
    fan_in_fan_out: InitVar[bool] = False
    megatron_config: InitVar[Any] = None
    megatron_core: InitVar[Any] = "megatron.core"
    runtime_config: InitVar[Any] = None
    loftq_config: InitVar[Any] = None
    eva_config: InitVar[Any] = None
    corda_config: InitVar[Any] = None
    lora_ga_config: InitVar[Any] = None
    lora_bias: InitVar[bool] = _only(False, None, why="jlora has no bias on lora_B")
    layer_replication: InitVar[Any] = _only(
        None, [], why="it makes another model out of the base's layers"
    )
    target_parameters: InitVar[Any] = _only(
        None, [], why="a Llama's weights all belong to modules"
    )
    alora_invocation_tokens: InitVar[Any] = _only(
        None, why="jlora has no activated LoRA"
    )
    arrow_config: InitVar[Any] = _only(
        None, why="jlora does not route between adapters"
    )
    velora_config: InitVar[Any] = _only(None, why="jlora has no VeLoRA")
    kasa_config: InitVar[Any] = _only(None, why="jlora has no KaSA")
    monteclora_config: InitVar[Any] = _only(None, why="jlora has no MonteCLoRA")
    use_bdlora: InitVar[Any] = _only(
        None, False, why="jlora has no block-diagonal LoRA"
    )
    use_qalora: InitVar[bool] = _only(False, None, why="jlora has no QALoRA")
    qalora_group_size: InitVar[int] = 16

    def __post_init__(self, *others: Any) -> None:
        """Checks every value; tuples and sets become lists.

        Raises:
            UsageError: a value of a wrong type or out of range, or fields that exclude
                each other.
            UnsupportedError: a PEFT feature that jlora does not have.
        """
        if refused := unsupported_fields(dict(zip(_NOT_KEPT, others, strict=True))):
            raise UnsupportedError(
                f"lora: jlora does not support {listing(refused)}; leave it out, or "
                "train with PEFT"
            )
        wrong = []
        for item in fields(self):
            value = _normalised(item, getattr(self, item.name))
            object.__setattr__(self, item.name, value)
            if not has_type(value, item.type):
                expected = type_in_words(item.type)
                wrong.append(f"{item.name}={value!r:.80} is not {expected}")
        if wrong:
            raise UsageError(f"lora: {joined(wrong)}")
        self._check_numbers()
        self._check_layers()
        self._check_initialisation()
        if self.bias not in ("none", "all", "lora_only"):
            raise UsageError(
                f"lora.bias={self.bias!r}; expected none, all or lora_only"
            )

    def _check_numbers(self) -> None:
        for name, rank in [("r", self.r), *self.rank_pattern.items()]:
            if not 1 <= rank <= MAX_RANK:
                raise UsageError(
                    f"lora: rank {name}={rank!r}; expected an integer from 1 to "
                    f"{MAX_RANK:,}"
                )
        alphas = [("lora_alpha", self.lora_alpha), *self.alpha_pattern.items()]
        for name, alpha in alphas:
            if not is_number(alpha) or not _ALPHAS[0] <= alpha <= _ALPHAS[1]:
                raise UsageError(
                    f"lora: {name}={alpha!r}; expected a number above 0, from "
                    f"{_ALPHAS[0]:g} to {_ALPHAS[1]:g}; with 0 the adapter has no effect"
                )
        # A rate that float32 rounds to 1 would drop everything.
        if not 0 <= self.lora_dropout < 1 - 2**-25:
            raise UsageError(
                f"lora.lora_dropout={self.lora_dropout!r}; expected 0 <= p < 1"
            )

    def _check_layers(self) -> None:
        if self.layers_to_transform is None:
            if self.layers_pattern:
                raise UsageError("lora.layers_pattern needs lora.layers_to_transform")
            return
        if isinstance(self.target_modules, str):
            raise UsageError(
                "lora.layers_to_transform needs target_modules as a list, "
                "not as a regular expression"
            )
        if negative := [index for index in self.layer_indices if index < 0]:
            raise UsageError(
                f"lora.layers_to_transform: {listing(negative)}; layers count from 0"
            )

    def _check_initialisation(self) -> None:
        method = self.init_lora_weights
        if method not in NEW_METHODS and not _PISSA_NITER.fullmatch(str(method)):
            why = _WHY_NOT_NEW.get(str(method), "it is not known")
            raise UnsupportedError(
                f"lora: jlora does not support init_lora_weights={method!r} ({why}); "
                f"jlora initialises adapters as true, false, {listing(NEW_METHODS[2:])} "
                "and pissa_niter_N"
            )
        odd = [r for r in (self.r, *self.rank_pattern.values()) if r % 2]
        if method == "orthogonal" and odd:
            raise UsageError(
                f"lora.init_lora_weights=orthogonal needs even ranks, not {listing(odd)}"
            )

    @property
    def layer_indices(self) -> list[int]:
        """The layers of layers_to_transform; none means all."""
        layers = self.layers_to_transform
        return [layers] if isinstance(layers, int) else layers or []

    def scaling(self, rank: int, alpha: float) -> float:
        """Returns the factor of the update: alpha / rank, or alpha / sqrt(rank)."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


_NOT_KEPT = {
    name: item
    for name, item in LoraConfig.__dataclass_fields__.items()
    if isinstance(item.type, InitVar)
}


def unsupported_fields(values: Mapping[str, Any]) -> list[str]:
    """Returns a phrase for each value of PEFT's LoraConfig that jlora does not support."""
    return [
        f"{name}={values[name]!r:.80} ({item.metadata['why']})"
        for name, item in _NOT_KEPT.items()
        if item.metadata and values.get(name) not in item.metadata["values"]
    ]


def _normalised(item: Field, value: Any) -> Any:
    """Returns a list for a tuple or set, an object for null, a method in lower case."""
    if isinstance(value, tuple | range):
        return list(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=lambda item: (str(type(item)), item))
    if value is None and typing.get_origin(item.type) is dict:
        return {}
    if item.name == "init_lora_weights" and isinstance(value, str):
        return value.lower()
    return value
