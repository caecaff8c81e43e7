"""What a model and an adapter are: `LlamaConfig` and `LoraConfig`.

Field names, defaults and meanings are those of Hugging Face's config.json and of PEFT's
adapter_config.json, which are the schemas. Validation lives here and nowhere else.
"""

import math
from dataclasses import InitVar, dataclass, field, fields
from typing import Any, no_type_check

from jlora.architectures import NEUTRAL, refuse_other_architectures
from jlora.errors import CorruptError, UnsupportedError, UsageError, listing
from jlora.fields import Fields, is_int, is_number, joined
from jlora.peft_fields import malformed, normalised, unsupported, unsupported_start
from jlora.rope_config import RopeParameters, read_rope

# Beyond the width of any Llama: a larger rank is a slip, not a wish.
MAX_RANK = 65536
# A name is made for every tensor of every layer before a file is opened.
MAX_LAYERS = 10_000


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture; field names and meanings as in HF's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: RopeParameters
    max_position_embeddings: int
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "LlamaConfig":
        """Returns the configuration that a config.json of HF (v4 or v5 layout) describes.

        Raises:
            UnsupportedError: not a Llama, or a Llama with parts jlora does not have.
            CorruptError: a missing key, a wrong type, or keys that contradict each other.

        Source: transformers `LlamaConfig`, `modeling_rope_utils`.
        """
        is_mistral = refuse_other_architectures(config)
        problems: list[str] = []
        values = Fields(config, problems)
        heads = values.size("num_attention_heads")
        kv_heads = values.size("num_key_value_heads", None if is_mistral else heads)
        hidden = values.size("hidden_size")
        head_dim = values.size("head_dim", max(hidden // heads, 1))
        # Absent, a Llama and a Mistral mean different numbers.
        default = None if is_mistral else 2048
        positions = values.size("max_position_embeddings", default)
        result = cls(
            vocab_size=values.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=values.size("intermediate_size"),
            num_hidden_layers=values.size("num_hidden_layers", most=MAX_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=values.number("rms_norm_eps", above=0),
            rope_parameters=read_rope(
                config, head_dim=head_dim, max_positions=positions, problems=problems
            ),
            max_position_embeddings=positions,
            attention_bias=values.boolean("attention_bias") and not is_mistral,
            mlp_bias=values.boolean("mlp_bias") and not is_mistral,
            tie_word_embeddings=values.boolean("tie_word_embeddings"),
            bos_token_id=values.token_id("bos_token_id"),
            eos_token_id=values.token_ids("eos_token_id"),
            pad_token_id=values.token_id("pad_token_id"),
        )
        if not problems and config.get("head_dim") is None and hidden % heads:
            problems.append(
                f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}, "
                "and head_dim is not given"
            )
        if heads % kv_heads:
            problems.append(
                f"num_attention_heads={heads} is not a multiple of "
                f"num_key_value_heads={kv_heads}"
            )
        if not problems and head_dim % 2:
            problems.append(f"head_dim={head_dim} is odd, rotary embeddings need pairs")
        if problems:
            raise CorruptError(
                f"config.json: {joined(problems)}; use the model's original config.json"
            )
        return result

    def check_length(self, length: int, name: str) -> None:
        """Raises UsageError if rows of `length` tokens are longer than the model's."""
        if length > self.max_position_embeddings:
            raise UsageError(
                f"{name}={length} exceeds the model's "
                f"max_position_embeddings={self.max_position_embeddings}; "
                "give at most that"
            )


def unused_keys(config: dict[str, Any]) -> list[str]:
    """Returns the keys of a config.json that do not matter to jlora."""
    used = {field.name for field in fields(LlamaConfig)} | set(NEUTRAL)
    used |= {"architectures", "model_type", "hidden_act", "layer_types", "dtype"}
    used |= {"torch_dtype", "rope_theta", "rope_scaling"}
    used |= {"original_max_position_embeddings", "transformers_version"}
    return sorted(set(config) - used)


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

    # The rest of PEFT's fields: judged by `jlora.peft_fields`, and not kept.
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
