"""Read the rotary settings of a config.json, which may be in three places, of six types.

`read_rope` resolves what null and absent keys stand for; the formulas that use the numbers
are in `jlora.model.rotary`.

Source: transformers `modeling_rope_utils` (4.57 and 5.23, where they agree).
"""

import math
from dataclasses import dataclass
from typing import Any

from jlora.config.json_fields import Fields, is_number
from jlora.errors import UnsupportedError, listing

DEFAULT_THETA = 10000.0
# Frequencies are float32: above its largest number they would all be 0.
MAX_THETA = 1e38
# Far above any real setting, and so small that the formulas do not overflow.
MAX_NUMBER = 1e6


@dataclass(frozen=True)
class RopeParameters:
    """Resolved rotary settings; field names as in HF's `rope_parameters`."""

    rope_theta: float
    rope_type: str = "default"
    factor: float = 1.0
    """By how much the context is longer than the original one."""
    original_max_position_embeddings: int = 0
    """Length of the original context; used by llama3, yarn and longrope."""
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

    As in transformers 5, they are those of `rope_scaling`, or of `rope_parameters` if it
    is empty, with theta there or at the top. Places that contradict each other are a
    problem.

    Raises:
        UnsupportedError: another type, or rotation of some dimensions or layers only.
    """
    old = _group(config, "rope_scaling", problems)
    new = _group(config, "rope_parameters", problems)
    theta = _theta([config, old, new], problems)
    old_type, new_type = _rope_type(old, problems), _rope_type(new, problems)
    if old and new:
        # Both may be given, with the same numbers, so that every reader finds them.
        keys = sorted({*old, *new} - {"rope_theta", "type", "rope_type"})
        differing = [key for key in keys if old.get(key) != new.get(key)]
        if old_type != new_type:
            differing.insert(0, "rope_type")
        if differing:
            problems.append(
                f"rope_scaling and rope_parameters differ in {listing(differing)}; "
                "remove the wrong one"
            )
    group, rope_type = (old, old_type) if old else (new, new_type)
    if rope_type not in _READERS:
        raise UnsupportedError(
            f"config.json: rope_type={rope_type!r:.80}; jlora supports "
            f"{listing(list(_READERS))}"
        )
    own_problems: list[str] = []
    settings = _Settings(
        Fields(group, own_problems), group, config, theta, head_dim, max_positions
    )
    rope = _READERS[rope_type](settings)
    problems += [f"rope_type {rope_type!r}: {problem}" for problem in own_problems]
    return rope


def _group(config: dict[str, Any], name: str, problems: list[str]) -> dict[str, Any]:
    """Returns one of the two objects, {} if it is absent."""
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
    thetas = set()
    for value in [place["rope_theta"] for place in places if "rope_theta" in place]:
        if is_number(value) and 1 < value <= MAX_THETA:
            thetas.add(float(value))
        else:
            problems.append(
                f"rope_theta={value!r:.80}, expected a number above 1, at most {MAX_THETA:g}"
            )
    if len(thetas) > 1:
        problems.append(
            f"rope_theta is given as {listing(sorted(thetas))}; keep the right one"
        )
    return min(thetas, default=DEFAULT_THETA)


def _rope_type(group: dict[str, Any], problems: list[str]) -> str:
    found = (group.get(key) for key in ("rope_type", "type"))
    types = {str(value) for value in found if value is not None}
    if len(types) > 1:
        problems.append(f"type and rope_type differ: {listing(sorted(types))}")
    return min(types, default="default")


@dataclass(frozen=True)
class _Settings:
    """What the reader of a type gets, and what the readers share."""

    fields: Fields
    group: dict[str, Any]
    config: dict[str, Any]
    theta: float
    head_dim: int
    max_positions: int

    def check(self, is_right: bool, problem: str) -> None:
        """Adds a problem unless something is right."""
        if not is_right:
            self.fields.problems.append(problem)

    def factor(self) -> float:
        """Returns the factor, which must be given."""
        return self.fields.number("factor", least=1, most=MAX_NUMBER)

    def attention_factor(self, default: float) -> float:
        """Returns the number that cos and sin are multiplied by."""
        return self.fields.number("attention_factor", default, least=0, most=MAX_NUMBER)

    def original(self, default: int | None, least: int = 1) -> int:
        """Returns the length of the original context, given in the group or at the top."""
        key = "original_max_position_embeddings"
        inner, outer = self.group.get(key), self.config.get(key)
        self.check(
            inner is None or outer is None or inner == outer,
            f"{key} is {outer!r:.40} at the top and {inner!r:.40} in the rope settings",
        )
        given = {key: outer if inner is None else inner}
        value = Fields(given, self.fields.problems).size(key, default)
        self.check(value >= least, f"{key}={value}, expected at least {least}")
        return max(value, least)


def _default(settings: _Settings) -> RopeParameters:
    return RopeParameters(settings.theta)


def _linear(settings: _Settings) -> RopeParameters:
    return RopeParameters(settings.theta, "linear", settings.factor())


def _dynamic(settings: _Settings) -> RopeParameters:
    # The exponent is d / (d - 2).
    settings.check(
        settings.head_dim > 2, f"head_dim={settings.head_dim}, expected at least 4"
    )
    return RopeParameters(settings.theta, "dynamic", settings.factor())


def _llama3(settings: _Settings) -> RopeParameters:
    fields = settings.fields
    low = fields.number("low_freq_factor", above=0, most=MAX_NUMBER)
    high = fields.number("high_freq_factor", above=0, most=MAX_NUMBER)
    settings.check(
        high > low or bool(fields.problems),
        f"high_freq_factor={high:g}, expected more than low_freq_factor={low:g}",
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
    fields = settings.fields
    original = settings.original(default=settings.max_positions)
    if settings.group.get("factor", ...) is None:  # null; an absent one is an error
        factor = settings.max_positions / original
        settings.check(
            factor >= 1,
            "factor is null, which means max_position_embeddings / "
            f"original_max_position_embeddings = {settings.max_positions} / "
            f"{original}, expected at least 1",
        )
    else:
        factor = settings.factor()
    fast, slow = _beta(settings, "beta_fast", 32.0), _beta(settings, "beta_slow", 1.0)
    settings.check(
        fast >= slow, f"beta_fast={fast:g}, expected at least beta_slow={slow:g}"
    )
    # Zero stands for a value that is not given.
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
        attention_factor=settings.attention_factor(attention),
    )


def _beta(settings: _Settings, key: str, default: float) -> float:
    """Returns the number of rotations at a limit of yarn; the default for 0 and null."""
    if settings.group.get(key) == 0 and settings.group[key] is not False:
        return default
    return settings.fields.number(key, default, least=1e-6, most=MAX_NUMBER)


def yarn_mscale(factor: float, scale: float = 1.0) -> float:
    """Returns the default of yarn's attention_factor."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(settings: _Settings) -> RopeParameters:
    fields = settings.fields
    # At least 2, as its logarithm is a divisor.
    original = settings.original(default=settings.max_positions, least=2)
    if settings.group.get("factor") is None:
        # Values below 1 have no effect, but readers of an exported model refuse them.
        factor = max(settings.max_positions / original, 1.0)
    else:
        factor = settings.factor()
    pairs = settings.head_dim // 2
    return RopeParameters(
        settings.theta,
        "longrope",
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=settings.attention_factor(longrope_mscale(factor, original)),
        short_factor=fields.numbers("short_factor", pairs),
        long_factor=fields.numbers("long_factor", pairs),
    )


def longrope_mscale(factor: float, original: int) -> float:
    """Returns the default of longrope's attention_factor."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


_READERS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
