"""The architecture of a model: `LlamaConfig`, read from a config.json of Hugging Face's."""

import functools
from dataclasses import dataclass, fields
from typing import Any

from jlora.config.architectures import NEUTRAL, find_family
from jlora.config.json_fields import MAX_SIZE, Fields, joined
from jlora.config.rope_config import RopeParameters, read_rope
from jlora.errors import CorruptError, UnsupportedError, UsageError, warn

# The names of all tensors of all layers are made before a file is opened.
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
    sliding_window: int | None = None
    """Tokens that a token sees, itself included; None for all before it. No text may be
    longer, and up to this length the window changes nothing."""

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "LlamaConfig":
        """Returns the architecture that a config.json of HF (v4 or v5 layout) describes.

        Raises:
            UnsupportedError: not a Llama, or one with parts that jlora does not have.
            CorruptError: a missing key, a wrong type, or keys that contradict each other.

        Source: transformers `LlamaConfig`, `modeling_rope_utils`.
        """
        is_mistral = find_family(config) != "llama"
        problems: list[str] = []
        values = Fields(config, problems)
        heads = values.size("num_attention_heads")
        kv_heads = values.size("num_key_value_heads", None if is_mistral else heads)
        hidden = values.size("hidden_size")
        head_dim = values.size("head_dim", max(hidden // heads, 1))
        # The default of a Mistral is another number, so it has to be given.
        default = None if is_mistral else 2048
        positions = values.size("max_position_embeddings", default)
        # An absent key is the default of Mistral's configuration, and null is no window.
        has_window = is_mistral and config.get("sliding_window", 0) is not None
        result = cls(
            vocab_size=values.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=values.size("intermediate_size"),
            num_hidden_layers=values.size("num_hidden_layers", most=MAX_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=values.number("rms_norm_eps", least=1e-12, most=1),
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
            sliding_window=values.size("sliding_window", 4096) if has_window else None,
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

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return min(self.max_position_embeddings, self.sliding_window or MAX_SIZE)

    def check_length(self, length: int, name: str) -> None:
        """Says once that a text of this length is within the attention window, if there is one.

        Raises:
            UsageError: the model has fewer positions.
            UnsupportedError: the window is shorter.
        """
        if length > self.max_position_embeddings:
            raise UsageError(
                f"{name}={length} exceeds the model's "
                f"max_position_embeddings={self.max_position_embeddings}; "
                "give at most that"
            )
        self.check_window(length, name)
        if self.sliding_window is not None:
            _say_within(name, self.sliding_window)

    def check_window(self, length: int, name: str) -> None:
        """Raises UnsupportedError if a text of this length exceeds the attention window."""
        if self.sliding_window is not None and length > self.sliding_window:
            raise UnsupportedError(
                f"{name}={length} exceeds the model's sliding_window={self.sliding_window}, "
                "and jlora computes full attention, which is the same up to that length "
                "only; give at most that"
            )


@functools.cache
def _say_within(name: str, window: int) -> None:
    warn(
        f"{name} is within the model's sliding_window={window}, where it is the same as "
        "full attention; longer texts are refused"
    )


def unused_keys(config: dict[str, Any]) -> list[str]:
    """Returns the keys of a config.json that jlora does not read."""
    used = {field.name for field in fields(LlamaConfig)} | set(NEUTRAL)
    used |= {"architectures", "model_type", "hidden_act", "layer_types", "dtype"}
    used |= {"torch_dtype", "rope_theta", "rope_scaling", "quantization_config"}
    used |= {"original_max_position_embeddings", "transformers_version"}
    return sorted(set(config) - used)
