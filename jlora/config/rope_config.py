"""Rotary settings of a config.json: three places, two generations, six types.

`read_rope` returns resolved numbers only: what a null or absent key stands for is decided
here, the formulas are in `jlora.model.rotary`.

Source: transformers `modeling_rope_utils` (4.57 and 5.23, where they agree).
"""

import math
from dataclasses import dataclass
from typing import Any

from jlora.config.json_fields import Fields, is_number
from jlora.errors import UnsupportedError, listing

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
DEFAULT_THETA = 10000.0
# Frequencies are float32: above its largest number they would all be 0.
MAX_THETA = 1e38
# Far from any real setting, and from where the formulas leave float64.
MAX_NUMBER = 1e6


@dataclass(frozen=True)
class RopeParameters:
    """Rotary embedding settings, resolved; field names as in HF's `rope_parameters`."""

    rope_theta: float
    rope_type: str = "default"
    factor: float = 1.0
    """How many times the original context is stretched."""
    original_max_position_embeddings: int = 0
    """The original context; used by llama3, yarn and longrope."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """What cos and sin are multiplied by."""
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


def read_rope(
    config: dict[str, Any], *, head_dim: int, max_positions: int, problems: list[str]
) -> RopeParameters:
    """Returns the rotary settings of a config.json; adds to `problems` what is wrong.

    As transformers 5 does: `rope_scaling`, if it is not empty, else `rope_parameters`,
    and theta there or at the top. Places that contradict each other are a problem.

    Raises:
        UnsupportedError: another type, or rotation of some dimensions or layers only.
    """
    old, new = (_group(config, key, problems) for key in _GROUPS)
    theta = _theta([config, old, new], problems)
    kinds = [_rope_type(group, problems) for group in (old, new)]
    if old and new:
        # A writer that serves every reader repeats the same numbers in both places.
        keys = sorted({*old, *new} - {"rope_theta", "type", "rope_type"})
        differing = [key for key in keys if old.get(key) != new.get(key)]
        if kinds[0] != kinds[1]:
            differing.insert(0, "rope_type")
        if differing:
            problems.append(
                f"rope_scaling and rope_parameters differ in {listing(differing)}; "
                "remove the wrong one"
            )
    group, kind = (old, kinds[0]) if old else (new, kinds[1])
    if kind not in ROPE_TYPES:
        raise UnsupportedError(
            f"config.json: rope_type={kind!r:.80}; jlora supports {listing(ROPE_TYPES)}"
        )
    noted: list[str] = []
    rope = _READERS[kind](
        _Settings(Fields(group, noted), group, config, theta, head_dim, max_positions)
    )
    problems += [f"rope_type {kind!r}: {problem}" for problem in noted]
    return rope


_GROUPS = ("rope_scaling", "rope_parameters")


def _group(config: dict[str, Any], name: str, problems: list[str]) -> dict[str, Any]:
    """Returns one of the two objects; an empty or absent one is {}."""
    group = config.get(name) or {}
    if not isinstance(group, dict):
        problems.append(f"{name}={group!r:.80}, expected an object")
        return {}
    for key, value in group.items():
        if key == "mrope_section" or isinstance(value, dict):
            raise UnsupportedError(
                f"config.json: {name} has {key}={value!r:.80}; jlora supports one "
                "rotary embedding for all layers and dimensions"
            )
    if group.get("partial_rotary_factor", 1) not in (1, None):
        raise UnsupportedError(
            f"config.json: {name} has partial_rotary_factor="
            f"{group['partial_rotary_factor']!r:.80}; jlora rotates whole heads only"
        )
    return group


def _theta(places: list[dict[str, Any]], problems: list[str]) -> float:
    found = [place["rope_theta"] for place in places if "rope_theta" in place]
    thetas = set()
    for value in found:
        if is_number(value) and 1 < value <= MAX_THETA:
            thetas.add(float(value))
        else:
            problems.append(f"rope_theta={value!r:.80}, expected a number above 1")
    if len(thetas) > 1:
        problems.append(
            f"rope_theta is given as {listing(sorted(thetas))}; keep the right one"
        )
    return min(thetas, default=DEFAULT_THETA)


def _rope_type(group: dict[str, Any], problems: list[str]) -> str:
    kinds = {
        str(group[key]) for key in ("rope_type", "type") if group.get(key) is not None
    }
    if len(kinds) > 1:
        problems.append(f"type and rope_type differ: {listing(sorted(kinds))}")
    return min(kinds, default="default")


@dataclass(frozen=True)
class _Settings:
    """What a type's reader needs."""

    fields: Fields
    group: dict[str, Any]
    config: dict[str, Any]
    theta: float
    head_dim: int
    max_positions: int

    def factor(self) -> float:
        """Returns the factor, which must be given."""
        return self.fields.number("factor", least=1, most=MAX_NUMBER)

    def original(self, default: int | None, least: int = 1) -> int:
        """Returns the original context, given in the group or at the top."""
        key = "original_max_position_embeddings"
        inner, outer = self.group.get(key), self.config.get(key)
        if inner is not None and outer is not None and inner != outer:
            self.fields.problems.append(
                f"{key} is {outer!r:.40} at the top and {inner!r:.40} in the rope "
                "settings"
            )
        value = Fields(
            {key: outer if inner is None else inner}, self.fields.problems
        ).size(key, default)
        if value < least:
            self.fields.problems.append(f"{key}={value}, expected at least {least}")
            return least
        return value


def _default(settings: _Settings) -> RopeParameters:
    return RopeParameters(settings.theta)


def _linear(settings: _Settings) -> RopeParameters:
    return RopeParameters(settings.theta, "linear", settings.factor())


def _dynamic(settings: _Settings) -> RopeParameters:
    if settings.head_dim <= 2:  # its exponent is d / (d - 2)
        settings.fields.problems.append(
            f"head_dim={settings.head_dim}, expected at least 4"
        )
    return RopeParameters(settings.theta, "dynamic", settings.factor())


def _llama3(settings: _Settings) -> RopeParameters:
    fields = settings.fields
    low = fields.number("low_freq_factor", above=0, most=MAX_NUMBER)
    high = fields.number("high_freq_factor", above=0, most=MAX_NUMBER)
    if high <= low and not fields.problems:
        fields.problems.append(
            f"high_freq_factor={high:g}, expected more than low_freq_factor={low:g}"
        )
    return RopeParameters(
        settings.theta,
        "llama3",
        factor=settings.factor(),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=settings.original(default=None),
    )


def _yarn(settings: _Settings) -> RopeParameters:
    fields, group = settings.fields, settings.group
    original = settings.original(default=settings.max_positions)
    if "factor" not in group:  # null has a meaning, absence has none
        factor = settings.factor()
    elif group["factor"] is None:
        factor = settings.max_positions / original
        if factor < 1:
            fields.problems.append(
                "factor is null, which means max_position_embeddings / "
                f"original_max_position_embeddings = {settings.max_positions} / "
                f"{original}, expected at least 1"
            )
    else:
        factor = settings.factor()
    fast, slow = _beta(settings, "beta_fast", 32.0), _beta(settings, "beta_slow", 1.0)
    if fast < slow:
        fields.problems.append(
            f"beta_fast={fast:g}, expected at least beta_slow={slow:g}"
        )
    # Zero stands for "not given"; negative ones have no meaning.
    mscale = fields.number("mscale", 0.0, least=0, most=MAX_NUMBER)
    mscale_all_dim = fields.number("mscale_all_dim", 0.0, least=0, most=MAX_NUMBER)
    if mscale and mscale_all_dim:
        attention = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    else:
        attention = yarn_mscale(factor)
    return RopeParameters(
        settings.theta,
        "yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=fast,
        beta_slow=slow,
        truncate=fields.boolean("truncate", True),
        attention_factor=fields.number(
            "attention_factor", attention, least=0, most=MAX_NUMBER
        ),
    )


def _beta(settings: _Settings, key: str, default: float) -> float:
    """Returns how many turns a limit stands for; 0 and null mean the default."""
    if settings.group.get(key) == 0 and settings.group[key] is not False:
        return default
    return settings.fields.number(key, default, least=1e-6, most=MAX_NUMBER)


def yarn_mscale(factor: float, scale: float = 1.0) -> float:
    """Returns what yarn multiplies cos and sin by, if no attention_factor is given."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(settings: _Settings) -> RopeParameters:
    fields = settings.fields
    # The logarithm of the original context is divided by.
    original = settings.original(default=settings.max_positions, least=2)
    if settings.group.get("factor") is None:
        # Below 1 it has no effect, and would be refused where it is written out.
        factor = max(settings.max_positions / original, 1.0)
    else:
        factor = settings.factor()
    pairs = settings.head_dim // 2
    return RopeParameters(
        settings.theta,
        "longrope",
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=fields.number(
            "attention_factor",
            longrope_mscale(factor, original),
            least=0,
            most=MAX_NUMBER,
        ),
        short_factor=fields.numbers("short_factor", pairs),
        long_factor=fields.numbers("long_factor", pairs),
    )


def longrope_mscale(factor: float, original: int) -> float:
    """Returns what longrope multiplies cos and sin by, if no attention_factor is given."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


_READERS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
