"""How the next token is chosen: the flags that generate, chat and serve share."""

from dataclasses import dataclass, field
from operator import not_

from jlora.config.field_types import replaces
from jlora.config.json_fields import MAX_SIZE
from jlora.config.run_config import check_seed
from jlora.errors import UsageError

NEW_TOKENS = 256
# Settings that leave out unlikely tokens, with the values that leave out none.
_OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


@dataclass(frozen=True)
class SamplingConfig:
    """Choice of the next token, in this order: penalty, temperature, top_k, top_p, min_p."""

    repetition_penalty: float = 1.0
    """Divides the score of tokens that have occurred, prompt included; 1: off."""
    temperature: float = field(default=0.0, metadata=replaces(*_OFF, when=not_))
    """0 takes the most likely token; higher is more random."""
    top_k: int = 0
    """Draw from this many of the most likely tokens; 0: all."""
    top_p: float = 1.0
    """Draw from the fewest tokens that together are this likely; 1: all."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the most likely one's; 0: none."""

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range."""
        wrong = [
            f"{name}={getattr(self, name)!r}; expected {expected}"
            for name, expected, is_right in (
                (
                    "temperature",
                    "0, or from 1e-6 to 1e6",
                    self.temperature == 0 or 1e-6 <= self.temperature <= 1e6,
                ),
                ("top_k", "at least 0", 0 <= self.top_k <= MAX_SIZE),
                ("top_p", "above 0, at most 1", 0 < self.top_p <= 1),
                ("min_p", "from 0 to 1", 0 <= self.min_p <= 1),
                (
                    "repetition_penalty",
                    "above 0, at most 1e6",
                    0 < self.repetition_penalty <= 1e6,
                ),
            )
            if not is_right
        ]
        if wrong:
            raise UsageError(", ".join(wrong))

    @property
    def steps(self) -> frozenset[str]:
        """The settings that change something; of a greedy choice, only the penalty can."""
        steps = {name for name, value in _OFF.items() if getattr(self, name) != value}
        steps = steps | {"temperature"} if self.temperature else set()
        if self.repetition_penalty != 1:
            steps |= {"repetition_penalty"}
        return frozenset(steps)


@dataclass(frozen=True)
class TextConfig(SamplingConfig):
    """How a text is generated."""

    max_new_tokens: int | None = None
    """Stop after this many tokens; null: after 256, or when the model's positions are full."""
    stop_strings: list[str] = field(
        default_factory=list, metadata={"is_repeated": True}
    )
    """Text before which an answer ends, besides the model's own end; several times, or a list."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range."""
        super().__post_init__()
        check_seed(self.seed)
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UsageError(
                f"max_new_tokens={self.max_new_tokens}; expected at least 1"
            )
        unused = [name for name in _OFF if getattr(self, name) != _OFF[name]]
        if unused and not self.temperature:
            verb = "has" if len(unused) == 1 else "have"
            raise UsageError(
                f"{' and '.join(unused)} {verb} no effect with temperature=0, which takes "
                "the most likely token; give a temperature to sample"
            )

    def count(self, used: int, longest: int) -> int:
        """Returns how many tokens to generate after `used`, in a model of `longest` positions."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return max(1, min(NEW_TOKENS, longest - used))
