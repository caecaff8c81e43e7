"""Limits the work of a chat template: steps and characters are counted, not timed.

So whether a record renders does not depend on the machine. Loops, calls, operators,
filters and block assignments all pay, as far as possible before they are computed.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.runtime
from jinja2.exceptions import SecurityError
from jinja2.nodes import Filter, List

MAX_WORK = 1 << 27
"""Characters that one rendering may handle."""
_STEP = 16  # What a step of a loop or filter costs, in characters.
_CALL = 512
_MAX_NUMBER = 1 << 20
_MAX_BITS = 4096
_MAX_INDENT = 64
_SIZED = (str, list, tuple, dict)
_STRINGS = frozenset({str})
_PREFIX = "_jlora_"  # no template names a filter so by chance


class Budget:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Grants the whole budget again, for the next rendering."""
        self._left = MAX_WORK

    def spend(self, amount: int) -> None:
        """Raises SecurityError if the whole budget is spent."""
        self._left -= amount
        if self._left < 0:
            raise SecurityError(
                f"more than {MAX_WORK // _STEP:,} steps or {MAX_WORK:,} characters"
            )

    def measure(self, *values: Any) -> int:
        """Returns about how many characters plain data prints as.

        Raises SecurityError if that is more than is left, and stops counting then: lists
        that hold one list many times can be exponentially large.
        """
        size = 0
        stack = list(values)
        while stack:
            value = stack.pop()
            size += _STEP
            if isinstance(value, str):
                size += len(value)
            elif isinstance(value, dict):
                stack += value.keys()
                stack += value.values()
            elif isinstance(value, list | tuple):
                stack += value
            if size > self._left:
                self.spend(size)
        return size

    def charge_result(self, value: Any) -> Any:
        """Pays for the length of a value and returns it."""
        if isinstance(value, _SIZED):
            self.spend(len(value))
        return value

    def finalize(self, value: Any) -> Any:
        """Pays for a value that is about to be printed and returns it."""
        if type(value) is not str and isinstance(value, list | tuple | dict):
            self.spend(self.measure(value))
        return value

    def binop(self, operator: str, left: Any, right: Any) -> None:
        """Pays for the result of an operator before it is computed."""
        if operator == "%" and isinstance(left, str):
            _check_numbers(right if isinstance(right, tuple) else (right,))
            self.format(left, right)
        elif isinstance(left, int) and isinstance(right, int):
            _check_bits(operator, left, right)
        elif operator == "+" and isinstance(left, _SIZED) and isinstance(right, _SIZED):
            self.spend(len(left) + len(right))
        elif operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(items, _SIZED) and isinstance(times, int):
                    self.spend(len(items) * max(times, 0))

    def format(self, template: str, *values: Any) -> None:
        """Pays for a format string, in which each field may print all the values."""
        if re.search(r"\d{7}", template):
            raise SecurityError("a format string with a width above 999,999")
        fields = template.count("%") + template.count("{")
        widths = sum(int(width) for width in re.findall(r"\d+", template))
        self.spend(len(template) + widths + fields * self.measure(*values))

    def replace(self, text: str, old: Any, new: Any) -> None:
        """Pays for replacing every `old` by `new`."""
        if isinstance(old, str) and isinstance(new, str):
            self.spend(len(text) + text.count(old) * len(new))

    def join(self, separator: str, items: list[Any]) -> None:
        """Pays for joining the items."""
        self.spend(self.measure(*items) + len(items) * len(separator))


def _check_numbers(values: Iterable[Any]) -> None:
    """Raises SecurityError for a number that is larger than any template needs."""
    for value in values:
        if isinstance(value, int) and abs(value) > _MAX_NUMBER:
            raise SecurityError(f"a call with a number above {_MAX_NUMBER:,}")


def _check_bits(operator: str, left: int, right: int) -> None:
    bits, more = left.bit_length(), right.bit_length()
    result = {"**": bits * right, "*": bits + more}.get(operator, max(bits, more))
    if result > _MAX_BITS:
        raise SecurityError(f"the result of {operator!r} is too large")


def charge_call(
    budget: Budget, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Pays for a call before it is made; returns the arguments to call with."""
    budget.spend(_CALL)
    _check_numbers([*args, *kwargs.values()])
    name = getattr(function, "__name__", "")
    text = getattr(function, "__self__", None)
    # The sandbox wraps str.format and str.format_map, and nothing else.
    template = getattr(getattr(function, "__wrapped__", None), "__self__", None)
    if isinstance(template, str):
        budget.format(template, *args, *kwargs.values())
    if not isinstance(text, str):
        return args
    if name == "translate":
        raise SecurityError("str.translate")
    if name == "replace" and len(args) > 1:
        budget.replace(text, args[0], args[1])
    elif name == "join" and args:
        args = (list(args[0]), *args[1:])
        budget.join(text, args[0])
    elif name == "expandtabs":
        number = next(iter((*args, *kwargs.values())), 8)
        budget.spend(text.count("\t") * number if isinstance(number, int) else 0)
    return args


def metered_filter(
    budget: Budget, name: str, filter: Callable[..., Any]
) -> Callable[..., Any]:
    """Returns a filter that pays for its input first, and for its result's length after."""
    skip = 1 if hasattr(filter, "jinja_pass_arg") else 0

    @functools.wraps(filter)
    def metered(*args: Any, **kwargs: Any) -> Any:
        budget.spend(_STEP)
        head, value, rest = args[:skip], args[skip], args[skip + 1 :]
        given = [*rest, *kwargs.values()]
        _check_numbers(given)
        if name == "join":
            value = list(value)
            budget.join(str(given[0]) if given else "", value)
        elif name == "replace" and len(rest) > 1:
            budget.replace(str(value), str(rest[0]), str(rest[1]))
        elif name == "format":
            budget.format(str(value), *given)
        elif name in ("indent", "tojson"):
            _charge_indented(budget, name, value, given)
        elif name == "sum":
            value = list(value)
            if not all(isinstance(item, int | float) for item in value) and not given:
                raise SecurityError("a sum of values that are not numbers")
        elif not isinstance(value, Iterator):
            budget.spend(budget.measure(value))  # it may be printed or copied
        return budget.charge_result(filter(*head, value, *rest, **kwargs))

    return metered


def _charge_indented(budget: Budget, name: str, value: Any, given: list[Any]) -> None:
    size = budget.measure(value)
    indents = [len(item) if isinstance(item, str) else item for item in given]
    indents = [item for item in indents if isinstance(item, int)]
    if name == "tojson" and any(item > _MAX_INDENT for item in indents):
        raise SecurityError(f"tojson with an indent above {_MAX_INDENT}")
    lines = str(value).count("\n") + 1 if name == "indent" else size
    budget.spend(size + lines * max([4, *indents]))


def node_filters(budget: Budget) -> dict[str, Callable[..., Any]]:
    """Returns the filters that `rewrite` inserts into a template."""

    def counted(items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            budget.spend(_STEP)
            yield item

    # `pass_context` keeps jinja2 from computing a filter when it compiles a template.
    @jinja2.pass_context
    def each(context: Any, items: Iterable[Any]) -> Iterable[Any]:
        if type(items) is list:
            budget.spend(_STEP * len(items))
            return items
        return counted(items)

    @jinja2.pass_context
    def concat(context: Any, items: list[Any]) -> str:
        budget.spend(budget.measure(*items))
        return "".join(map(str, items))

    @jinja2.pass_context
    def charge(context: Any, text: str) -> str:
        return budget.charge_result(text)

    # Nearly always of strings: joined at once, because templates add up every message.
    @jinja2.pass_context
    def add(context: Any, items: list[Any]) -> Any:
        if _STRINGS.issuperset(map(type, items)):
            budget.spend(sum(map(len, items)))
            return "".join(items)
        plus = functools.partial(context.environment.call_binop, context, "+")
        return functools.reduce(plus, items)

    filters = {"each": each, "concat": concat, "charge": charge, "add": add}
    return {_PREFIX + name: filter for name, filter in filters.items()}


def rewrite(tree: jinja2.nodes.Template) -> jinja2.nodes.Template:
    """Inserts filters that charge loops, concatenations, block assignments and sums."""
    for node in tree.find_all(jinja2.nodes.For):
        node.iter = _filter(node.iter, "each")
    for node in tree.find_all(jinja2.nodes.AssignBlock):
        node.filter = _filter(node.filter, "charge")
    _charge_sums_below(tree)
    if tree.environment is not None:
        tree.set_environment(tree.environment)
    return tree


def _filter(node: Any, name: str) -> Filter:
    return Filter(node, _PREFIX + name, [], [], None, None)


def _charge_sums_below(node: jinja2.nodes.Node) -> None:
    """Replaces what a node holds by what `_with_charged_sums` returns for it."""
    for field, value in node.iter_fields():
        if isinstance(value, list):
            value[:] = [_with_charged_sums(item) for item in value]
        else:
            setattr(node, field, _with_charged_sums(value))


def _with_charged_sums(value: Any) -> Any:
    """Returns a node whose sums a + b + c and concatenations a ~ b are filters."""
    if not isinstance(value, jinja2.nodes.Node):
        return value
    terms = _terms(value)
    if len(terms) > 2:  # a + b goes through `call_binop`
        return _filter(List([_with_charged_sums(term) for term in terms]), "add")
    _charge_sums_below(value)
    if isinstance(value, jinja2.nodes.Concat):
        return _filter(List(value.nodes), "concat")
    return value


def _terms(node: jinja2.nodes.Node) -> list[jinja2.nodes.Node]:
    """Returns [a, b, c] of a + b + c, and [node] of any other node."""
    if isinstance(node, jinja2.nodes.Add):
        return [*_terms(node.left), node.right]
    return [node]
