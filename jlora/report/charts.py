"""Lines over steps as coordinates of an SVG picture, which the report's template draws."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Points = Sequence[tuple[int, float]]

WIDTH, HEIGHT = 480, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 28
# More points of a line than this cannot be told apart on a screen.
_MOST_POINTS = 600


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        points: (step, value) in order.
        style: class of the template's CSS.
        color: index of the template's colours.
        label: in the legend; empty for none.
        mark: a point to mark, and its text.
    """

    points: Points
    style: str = "smooth"
    color: int = 0
    label: str = ""
    mark: tuple[int, float, str] | None = None


@dataclass(frozen=True)
class Chart:
    """A titled picture of one or more lines; `from_zero`: the axis of values begins at 0."""

    title: str
    lines: list[Line]
    from_zero: bool = False
    drawn: list[dict[str, object]] = field(init=False)
    x_ticks: list[tuple[float, str]] = field(init=False)
    y_ticks: list[tuple[float, str]] = field(init=False)

    def __post_init__(self) -> None:
        """Computes what is drawn where."""
        points = [point for line in self.lines for point in line.points]
        steps = _ticks([step for step, _ in points])
        values = _ticks([value for _, value in points] + [0.0] * self.from_zero)
        scale_x = _scale(steps.low, steps.high, _LEFT, WIDTH - _RIGHT)
        scale_y = _scale(values.low, values.high, HEIGHT - _BOTTOM, _TOP)
        drawn = []
        for line in self.lines:
            thin = thinned(line.points)
            path = " ".join(f"{scale_x(x):.1f},{scale_y(y):.1f}" for x, y in thin)
            mark = line.mark and {
                "x": round(scale_x(line.mark[0]), 1),
                "y": round(scale_y(line.mark[1]), 1),
                "text": line.mark[2],
                "anchor": "end" if scale_x(line.mark[0]) > WIDTH / 2 else "start",
            }
            drawn.append({"line": line, "path": path, "mark": mark})
        object.__setattr__(self, "drawn", drawn)
        for name, ticks, scale in (
            ("x_ticks", steps, scale_x),
            ("y_ticks", values, scale_y),
        ):
            places = [(round(scale(n), 1), tick_text(n, ticks.step)) for n in ticks.at]
            object.__setattr__(self, name, places)


@dataclass(frozen=True)
class _Ticks:
    low: float
    high: float
    step: float
    at: list[float]


def _ticks(values: Sequence[float]) -> _Ticks:
    """Returns the range of an axis, and up to 5 round numbers in it."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(m * power for m in (1, 2, 5, 10) if (high - low) / (m * power) <= 5)
    first, last = math.ceil(low / step), math.floor(high / step)
    return _Ticks(low, high, step, [n * step for n in range(first, last + 1)])


def _scale(
    low: float, high: float, start: float, end: float
) -> Callable[[float], float]:
    """Returns the linear function from [low, high] to [start, end]."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def tick_text(value: float, step: float) -> str:
    """Returns a number beside an axis whose numbers are `step` apart, short."""
    units = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
    unit, letter = next((u for u in units if abs(value) >= u[0]), (1.0, ""))
    digits = max(0, -math.floor(math.log10(step / unit) + 1e-9))
    if digits > 4:  # such as a learning rate
        figures = 2 + math.floor(math.log10(max(abs(value) / step, 1)) + 1e-9)
        return f"{value:.{figures}g}"
    return f"{value / unit:.{digits}f}{letter}"


def smoothed(points: Points) -> list[tuple[int, float]]:
    """Returns an exponential moving average over about a 25th of the points."""
    window = max(1, len(points) // 25)
    share = 2 / (window + 1)
    result: list[tuple[int, float]] = []
    weight = mean = 0.0
    for step, value in points:
        # Divided by the weights so far, so that the first value does not count for more.
        weight = weight * (1 - share) + share
        mean = mean * (1 - share) + share * value
        result.append((step, mean / weight))
    return result


def thinned(points: Points) -> Points:
    """Returns at most so many points as a screen shows, each the mean of some."""
    size = -(-len(points) // _MOST_POINTS)
    if size <= 1:
        return points
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]
