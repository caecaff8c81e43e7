"""What a chat template may spend: steps and characters, counted and not timed.

A budget is the same on every machine, so whether a record renders depends on the record
alone. Everything that can grow goes through it: loops, calls, operators, filters, block
assignments. What cannot be bounded beforehand is charged before it is computed.
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
"""Characters that one rendering may handle; a step costs as much as 16 of them."""
STEP = 16
_CALL = 512
MAX_NUMBER = 1 << 20
MAX_BITS = 4096
_MAX_INDENT = 64
_SIZED = (str, list, tuple, dict)
_STRINGS = frozenset({str})


class Budget:
    """What is left of one rendering's allowance."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begins a rendering."""
        self._left = MAX_WORK

    def spend(self, amount: int) -> None:
        """Raises SecurityError when more than the whole allowance is spent."""
        self._left -= amount
        if self._left < 0:
            raise SecurityError(
                f"more than {MAX_WORK // STEP:,} steps or {MAX_WORK:,} characters"
            )

    def measure(self, *values: Any) -> int:
        """Returns how many characters plain data would print as, roughly.

        Raises:
            SecurityError: more than what is left; lists may hold one list many times.
        """
        size = 0
        stack = list(values)
        while stack:
            value = stack.pop()
            size += STEP
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
        """Returns the value, after its length is paid for."""
        if isinstance(value, _SIZED):
            self.spend(len(value))
        return value

    def finalize(self, value: Any) -> Any:
        """Returns a value that is about to be printed, after its size is paid for."""
        if type(value) is not str and isinstance(value, list | tuple | dict):
            self.spend(self.measure(value))
        return value

    def binop(self, operator: str, left: Any, right: Any) -> None:
        """Pays for the result of an operator before it is computed."""
        if operator == "%" and isinstance(left, str):
            check_numbers(*(right if isinstance(right, tuple) else (right,)))
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
        """Pays for a format string: each field may print all the values."""
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


def check_numbers(*values: Any) -> None:
    """Raises SecurityError for an argument that no template needs as large."""
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise SecurityError(f"a call with a number above {MAX_NUMBER:,}")


def _check_bits(operator: str, left: int, right: int) -> None:
    bits, more = left.bit_length(), right.bit_length()
    result = {"**": bits * right, "*": bits + more}.get(operator, max(bits, more))
    if result > MAX_BITS:
        raise SecurityError(f"the result of {operator!r} is too large")


def metered_call(
    budget: Budget, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Pays for a call before it is made; returns the arguments to make it with."""
    budget.spend(_CALL)
    check_numbers(*args, *kwargs.values())
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
        number = next((n for n in (*args, *kwargs.values())), 8)
        budget.spend(text.count("\t") * number if isinstance(number, int) else 0)
    return args


def metered_filter(
    budget: Budget, name: str, filter: Callable[..., Any]
) -> Callable[..., Any]:
    """Returns the filter, which pays for its result before and after it is made."""
    skip = 1 if hasattr(filter, "jinja_pass_arg") else 0

    @functools.wraps(filter)
    def metered(*args: Any, **kwargs: Any) -> Any:
        budget.spend(STEP)
        head, value, rest = args[:skip], args[skip], args[skip + 1 :]
        given = [*rest, *kwargs.values()]
        check_numbers(*given)
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
                raise SecurityError("a sum of what are no numbers")
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
    """Returns the filters that `rewrite` puts into a template."""

    def counted(items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            budget.spend(STEP)
            yield item

    # A filter that needs the context is not computed when a template is compiled.
    @jinja2.pass_context
    def each(context: Any, items: Iterable[Any]) -> Iterable[Any]:
        if type(items) is list:
            budget.spend(STEP * len(items))
            return items
        return counted(items)

    @jinja2.pass_context
    def concat(context: Any, items: list[Any]) -> str:
        budget.spend(budget.measure(*items))
        return "".join(map(str, items))

    @jinja2.pass_context
    def charge(context: Any, text: str) -> str:
        return budget.charge_result(text)

    # Of strings, nearly always: at once, as a template adds up every message.
    @jinja2.pass_context
    def add(context: Any, items: list[Any]) -> Any:
        if _STRINGS.issuperset(map(type, items)):
            budget.spend(sum(map(len, items)))
            return "".join(items)
        plus = functools.partial(context.environment.call_binop, context, "+")
        return functools.reduce(plus, items)

    return {f"_jlora_{f.__name__}": f for f in (each, concat, charge, add)}


def rewrite(tree: jinja2.nodes.Template) -> jinja2.nodes.Template:
    """Puts loops, concatenations, block assignments and sums on the budget, in place."""
    for node in tree.find_all(jinja2.nodes.For):
        node.iter = _filter(node.iter, "each")
    for node in tree.find_all(jinja2.nodes.AssignBlock):
        node.filter = _filter(node.filter, "charge")
    _replace_sums(tree)
    if tree.environment is not None:
        tree.set_environment(tree.environment)
    return tree


def _filter(node: Any, name: str) -> Filter:
    return Filter(node, f"_jlora_{name}", [], [], None, None)


def _replace_sums(node: jinja2.nodes.Node) -> None:
    for field, value in node.iter_fields():
        if isinstance(value, list):
            value[:] = [_metered_sum(item) for item in value]
        else:
            setattr(node, field, _metered_sum(value))


def _metered_sum(value: Any) -> Any:
    if not isinstance(value, jinja2.nodes.Node):
        return value
    terms = _terms(value)
    if len(terms) > 2:  # a + b is called by itself
        return _filter(List([_metered_sum(term) for term in terms]), "add")
    _replace_sums(value)
    if isinstance(value, jinja2.nodes.Concat):
        return _filter(List(value.nodes), "concat")
    return value


def _terms(node: jinja2.nodes.Node) -> list[jinja2.nodes.Node]:
    """Returns a, b and c of a + b + c, and the node itself of any other."""
    terms: list[jinja2.nodes.Node] = []
    while isinstance(node, jinja2.nodes.Add):
        terms.append(node.right)
        node = node.left
    return [*terms, node][::-1]
