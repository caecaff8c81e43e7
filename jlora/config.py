"""What a model and an adapter are: `LlamaConfig` and `LoraConfig`.

Field names, defaults and meanings are those of Hugging Face's config.json and of PEFT's
adapter_config.json, which are the schemas. Validation lives here and nowhere else.
"""

import math
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from jlora.errors import CorruptError, UnsupportedError, UsageError, listing

# Beyond the width of any Llama: a larger rank is a slip, not a wish.
MAX_RANK = 65536
SUPPORTED_ROPE_TYPES = ("default", "llama3")
_ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel")
# Keys that change the computation, with the value that leaves a Llama a Llama.
_MUST_BE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "sliding_window": (None, False),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "partial_rotary_factor": (None, 1),
    "quantization_config": (None,),
}


@dataclass(frozen=True)
class RopeParameters:
    """Rotary embedding settings; field names as in HF's `rope_parameters`."""

    rope_theta: float
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


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
        _refuse_other_architectures(config)
        heads = _positive_int(config, "num_attention_heads")
        kv_heads = _positive_int(config, "num_key_value_heads", heads)
        hidden = _positive_int(config, "hidden_size")
        if heads % kv_heads:
            raise CorruptError(
                f"config.json: num_attention_heads={heads} is not a multiple of "
                f"num_key_value_heads={kv_heads}"
            )
        if config.get("head_dim") is None and hidden % heads:
            raise CorruptError(
                f"config.json: hidden_size={hidden} is not a multiple of "
                f"num_attention_heads={heads}, and head_dim is not given"
            )
        head_dim = _positive_int(config, "head_dim", hidden // heads)
        if head_dim % 2:
            raise CorruptError(
                f"config.json: head_dim={head_dim} is odd; rotary embeddings need pairs"
            )
        eps = config.get("rms_norm_eps")
        if not _is_number(eps) or not eps > 0:
            raise CorruptError(
                f"config.json: rms_norm_eps={eps!r}; expected a number above 0"
            )
        eos = config.get("eos_token_id")
        return cls(
            vocab_size=_positive_int(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_positive_int(config, "intermediate_size"),
            num_hidden_layers=_positive_int(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(eps),
            rope_parameters=_rope_parameters(config),
            max_position_embeddings=_positive_int(
                config, "max_position_embeddings", 2048
            ),
            attention_bias=_boolean(config, "attention_bias"),
            mlp_bias=_boolean(config, "mlp_bias"),
            tie_word_embeddings=_boolean(config, "tie_word_embeddings"),
            bos_token_id=_token_id(config, "bos_token_id"),
            eos_token_id=tuple(eos)
            if isinstance(eos, list) and all(_is_int(i) for i in eos)
            else tuple(i for i in [_token_id(config, "eos_token_id")] if i is not None),
            pad_token_id=_token_id(config, "pad_token_id"),
        )

    def check_length(self, length: int, name: str) -> None:
        """Raises UsageError if rows of `length` tokens are longer than the model's."""
        if length > self.max_position_embeddings:
            raise UsageError(
                f"{name}={length} exceeds the model's "
                f"max_position_embeddings={self.max_position_embeddings}; "
                "give at most that"
            )


def _refuse_other_architectures(config: dict[str, Any]) -> None:
    names = config.get("architectures") or []
    kind = config.get("model_type")
    known = isinstance(names, list) and all(name in _ARCHITECTURES for name in names)
    if not known or kind not in (None, "llama"):
        found = listing(names if isinstance(names, list) else [names]) or "none"
        raise UnsupportedError(
            f"config.json: architectures={found}, model_type={kind!r} is not a Llama; "
            "jlora supports LlamaForCausalLM only"
        )
    if not names and kind is None:
        raise UnsupportedError(
            "config.json: neither architectures nor model_type says what this model "
            "is; jlora supports model_type 'llama' only"
        )
    for key, neutral in _MUST_BE_NEUTRAL.items():
        if config.get(key) not in neutral:
            what = config[key]
            if key == "quantization_config" and isinstance(what, dict):
                method = what.get("quant_method", "unknown method")
                raise UnsupportedError(
                    f"config.json: the checkpoint is quantised ({method}); "
                    "use the original bfloat16 or float32 model"
                )
            raise UnsupportedError(
                f"config.json: {key}={what!r} changes the computation, so this is not "
                "a plain Llama; jlora does not support it"
            )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedError(
            f"config.json: hidden_act={config['hidden_act']!r}; jlora supports 'silu'"
        )
    layer_types = config.get("layer_types")
    if layer_types and not (
        isinstance(layer_types, list)
        and all(kind == "full_attention" for kind in layer_types)
    ):
        raise UnsupportedError(
            f"config.json: layer_types={layer_types!r:.120}; "
            "jlora supports full_attention in every layer only"
        )


def _rope_parameters(config: dict[str, Any]) -> RopeParameters:
    """Reads the three places rope settings live in; contradictions are errors."""
    old, new = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    for name, group in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(group, dict):
            raise CorruptError(f"config.json: {name} is not an object")
        for key, value in group.items():
            if key == "mrope_section" or isinstance(value, dict):
                raise UnsupportedError(
                    f"config.json: {name} has {key}={value!r:.80}; jlora supports one "
                    "rotary embedding for all layers and dimensions"
                )
        if group.get("partial_rotary_factor", 1) != 1:
            raise UnsupportedError(
                f"config.json: {name} has partial_rotary_factor="
                f"{group['partial_rotary_factor']!r}; jlora rotates whole heads only"
            )
    thetas = []
    for group in (config, old, new):
        if "rope_theta" in group:
            theta = group["rope_theta"]
            if not _is_number(theta) or theta <= 1:
                raise CorruptError(
                    f"config.json: rope_theta={theta!r}; expected a number > 1"
                )
            thetas.append(float(theta))
    if len(set(thetas)) > 1:
        raise CorruptError(
            f"config.json: rope_theta is given as {listing(sorted(set(thetas)))}; "
            "keep the right one"
        )
    theta = thetas[0] if thetas else 10000.0
    if old and new:
        # A writer that serves every reader repeats the same numbers in both places.
        differing = [
            key
            for key in sorted(set(old) | set(new))
            if key not in ("rope_theta", "type", "rope_type")
            and old.get(key) != new.get(key)
        ]
        if _rope_type(old) != _rope_type(new) or differing:
            raise CorruptError(
                "config.json: rope_scaling and rope_parameters differ "
                f"(in {listing(differing or ['rope_type'])}); remove the wrong one"
            )
    group = new or old
    rope_type = _rope_type(group)
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise UnsupportedError(
            f"config.json: rope_type={rope_type!r}; jlora supports "
            f"{listing(SUPPORTED_ROPE_TYPES)}"
        )
    if rope_type == "default":
        return RopeParameters(rope_theta=theta)
    values = {}
    for key in ("factor", "low_freq_factor", "high_freq_factor"):
        value = group.get(key)
        if not _is_number(value) or value <= 0:
            raise CorruptError(
                f"config.json: rope_type 'llama3' needs {key} as a number above 0, "
                f"found {value!r}"
            )
        values[key] = float(value)
    original = group.get("original_max_position_embeddings")
    outer = config.get("original_max_position_embeddings")
    if not _is_int(original) or original <= 0:
        raise CorruptError(
            "config.json: rope_type 'llama3' needs original_max_position_embeddings "
            f"as an integer above 0, found {original!r}"
        )
    if outer is not None and outer != original:
        raise CorruptError(
            f"config.json: original_max_position_embeddings is {outer} at the top and "
            f"{original} in the rope settings"
        )
    if values["factor"] < 1 or values["high_freq_factor"] <= values["low_freq_factor"]:
        raise CorruptError(
            "config.json: llama3 rope needs factor >= 1 and high_freq_factor > "
            f"low_freq_factor, found {values}"
        )
    return RopeParameters(
        rope_theta=theta,
        rope_type="llama3",
        original_max_position_embeddings=original,
        **values,
    )


def _rope_type(group: dict[str, Any]) -> str:
    kinds = {
        str(group[key]) for key in ("rope_type", "type") if group.get(key) is not None
    }
    if len(kinds) > 1:
        raise CorruptError(
            f"config.json: type and rope_type differ: {listing(sorted(kinds))}"
        )
    return kinds.pop() if kinds else "default"


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _positive_int(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not _is_int(value) or value <= 0:
        raise CorruptError(f"config.json: {key}={value!r}; expected an integer above 0")
    return value


def _boolean(config: dict[str, Any], key: str) -> bool:
    value = config.get(key)
    if value not in (None, False, True) or _is_int(value):
        raise CorruptError(f"config.json: {key}={value!r}; expected true or false")
    return bool(value)


def _token_id(config: dict[str, Any], key: str) -> int | None:
    value = config.get(key)
    if value is not None and not _is_int(value):
        raise CorruptError(f"config.json: {key}={value!r}; expected a token id")
    return value


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
    """Weight-decomposed LoRA; not supported yet."""
    init_lora_weights: bool | str = True
    """true: A uniform, B zero; gaussian: A normal, B zero; false: both uniform (for tests)."""
    modules_to_save: list[str] | None = None
    """Modules to train in full; not supported yet."""
    bias: str = "none"
    """Which biases to train; only none is supported."""

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
            UsageError: a value out of range, or fields that exclude each other.
            UnsupportedError: a PEFT feature that jlora does not have.
        """
        for name, rank in [("r", self.r), *self.rank_pattern.items()]:
            if not _is_int(rank) or not 1 <= rank <= MAX_RANK:
                raise UsageError(
                    f"lora: rank {name}={rank!r}; expected an integer from 1 to "
                    f"{MAX_RANK:,}"
                )
        for name, alpha in [
            ("lora_alpha", self.lora_alpha),
            *self.alpha_pattern.items(),
        ]:
            if not _is_number(alpha) or alpha <= 0:
                raise UsageError(
                    f"lora: {name}={alpha!r}; expected a number above 0, "
                    "otherwise the adapter has no effect"
                )
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
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
        if self.layers_pattern and self.layers_to_transform is None:
            raise UsageError("lora.layers_pattern needs lora.layers_to_transform")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise UnsupportedError(
                f"lora.init_lora_weights={self.init_lora_weights!r}; "
                "jlora supports true, false and 'gaussian'"
            )
        for name, neutral in (
            ("use_dora", False),
            ("modules_to_save", None),
            ("bias", "none"),
        ):
            value = getattr(self, name)
            if value != neutral and not (name == "modules_to_save" and value == []):
                raise UnsupportedError(
                    f"lora.{name}={value!r} is not supported; leave it at {neutral!r}"
                )

    def scaling(self, rank: int, alpha: float) -> float:
        """Returns the factor of the update: alpha / rank, or alpha / sqrt(rank)."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank
