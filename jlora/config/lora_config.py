"""The settings of an adapter: `LoraConfig`, with PEFT's field names, defaults and meanings."""

import math
from dataclasses import InitVar, dataclass, field, fields
from typing import Any, no_type_check

from jlora.config.json_fields import is_int, is_number, joined
from jlora.config.peft_fields import (
    malformed,
    normalised,
    unsupported,
    unsupported_start,
)
from jlora.errors import UnsupportedError, UsageError, listing

# Beyond the width of any Llama: a larger rank is a slip, not a wish.
MAX_RANK = 65536


@no_type_check  # by the tests' import hook: __post_init__ tells users what is wrong
@dataclass(frozen=True)
class LoraConfig:
    """The adapter; field names, defaults and meanings as in PEFT's LoraConfig."""

    r: int = 8
    """Rank of the update."""
    lora_alpha: float = 8
    """Scaling numerator: the update is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout probability on the input of lora_A, in training only."""
    target_modules: list[str] | str | None = None
    """Names (suffixes), one regular expression, or all-linear; null means q_proj, v_proj."""
    exclude_modules: list[str] | str | None = None
    """Names or one regular expression of modules to leave out; same syntax as target_modules."""
    layers_to_transform: list[int] | int | None = None
    """Layer indices that get an adapter; null means all."""
    layers_pattern: list[str] | str | None = None
    """Name of the layer list that layers_to_transform counts in; null finds it."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Regular expression -> rank, where it differs from r."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Regular expression -> alpha, where it differs from lora_alpha."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (rank-stabilised LoRA)."""
    use_dora: bool = False
    """Train each output's length beside the update (weight-decomposed LoRA)."""
    init_lora_weights: bool | str = True
    """true (A uniform, B zero), false (both), gaussian, orthogonal, pissa, pissa_niter_N, olora."""
    modules_to_save: list[str] | None = None
    """Ends of names of modules to train in full, such as lm_head."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Token ids whose rows of the embedding are trained, or table -> ids."""
    ensure_weight_tying: bool = False
    """On a tied base: what is trained on the embedding serves the head, too."""
    bias: str = "none"
    """Which biases an adapter brings (all, lora_only); training leaves them alone."""
    base_model_name_or_path: str | None = None
    """Where readers of the adapter find its base; null: --model."""
    revision: str | None = None
    """Of the base on the hub."""

    # The rest of PEFT's fields: judged by `jlora.config.peft_fields`, and not kept.
    peft_type: InitVar[Any] = None
    task_type: InitVar[Any] = None
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
    lora_bias: InitVar[bool] = False
    layer_replication: InitVar[Any] = None
    target_parameters: InitVar[Any] = None
    alora_invocation_tokens: InitVar[Any] = None
    arrow_config: InitVar[Any] = None
    velora_config: InitVar[Any] = None
    kasa_config: InitVar[Any] = None
    monteclora_config: InitVar[Any] = None
    use_bdlora: InitVar[Any] = None
    use_qalora: InitVar[bool] = False
    qalora_group_size: InitVar[int] = 16

    def __post_init__(self, *others: Any) -> None:
        """Checks every value; tuples and sets become lists.

        Raises:
            UsageError: a value of a wrong type or out of range, or fields that exclude
                each other.
            UnsupportedError: a PEFT feature that jlora does not have.
        """
        names = (
            name
            for name, item in type(self).__dataclass_fields__.items()
            if isinstance(item.type, InitVar)
        )
        refused = unsupported(dict(zip(names, others, strict=True)))
        if refused:
            raise UnsupportedError(
                f"lora: jlora does not support {listing(refused)}; leave it out, or "
                "train with PEFT"
            )
        values = normalised(
            {item.name: getattr(self, item.name) for item in fields(self)}
        )
        wrong = malformed(values)
        if wrong:
            raise UsageError(f"lora: {joined(wrong)}")
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check_ranges()
        self._check_start()

    def _check_ranges(self) -> None:
        for name, rank in [("r", self.r), *self.rank_pattern.items()]:
            if not is_int(rank) or not 1 <= rank <= MAX_RANK:
                raise UsageError(
                    f"lora: rank {name}={rank!r}; expected an integer from 1 to "
                    f"{MAX_RANK:,}"
                )
        for name, alpha in [
            ("lora_alpha", self.lora_alpha),
            *self.alpha_pattern.items(),
        ]:
            if not is_number(alpha) or alpha <= 0:
                raise UsageError(
                    f"lora: {name}={alpha!r}; expected a number above 0, "
                    "otherwise the adapter has no effect"
                )
        if not is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise UsageError(
                f"lora.lora_dropout={self.lora_dropout!r}; expected 0 <= p < 1"
            )
        if (
            isinstance(self.target_modules, str)
            and self.layers_to_transform is not None
        ):
            raise UsageError(
                "lora.layers_to_transform needs target_modules as a list, "
                "not as a regular expression"
            )
        layers = self.layers_to_transform or []
        layers = [layers] if isinstance(layers, int) else layers
        negative = [index for index in layers if index < 0]
        if negative:
            raise UsageError(
                f"lora.layers_to_transform: {listing(negative)}; layers count from 0"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise UsageError("lora.layers_pattern needs lora.layers_to_transform")
        if self.bias not in ("none", "all", "lora_only"):
            raise UsageError(
                f"lora.bias={self.bias!r}; expected none, all or lora_only"
            )

    def _check_start(self) -> None:
        start = self.init_lora_weights
        if problem := unsupported_start(start):
            raise UnsupportedError(f"lora: jlora does not support {problem}")
        odd = [r for r in (self.r, *self.rank_pattern.values()) if r % 2]
        if start == "orthogonal" and odd:
            raise UsageError(
                f"lora.init_lora_weights=orthogonal needs even ranks, not {listing(odd)}"
            )

    def scaling(self, rank: int, alpha: float) -> float:
        """Returns the factor of the update: alpha / rank, or alpha / sqrt(rank)."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank
