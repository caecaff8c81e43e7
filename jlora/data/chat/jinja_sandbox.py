"""The jinja2 environment for chat templates: Transformers' own, with limits on its work."""

import importlib.metadata
import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
from jinja2.exceptions import SecurityError, TemplateError

from jlora.data.chat.control_tokens import CLOSE_GENERATION, OPEN_GENERATION
from jlora.data.chat.template_budget import (
    Budget,
    charge_call,
    metered_filter,
    node_filters,
    rewrite,
)
from jlora.errors import UnsupportedError

# "Today" for templates that print the date: the fallback of Llama 3.2's own template.
# Pinned, so that neither the data nor a resumed run depends on the clock.
PINNED_DATE = datetime(2024, 7, 26)
_MIN_JINJA2 = (3, 1, 6)
# Bounds the cache of `is_safe_attribute`, as a template may ask for any name.
_MAX_CACHED = 1000
_LOOP_ATTRIBUTES = frozenset({"first", "last", "index", "index0"})
# Random, or made for web pages, and their output has no known bound.
_REMOVED_FILTERS = ("random", "pprint", "urlize", "wordwrap", "xmlattr")


def make_environment() -> "_Sandbox":
    """Returns the environment of transformers' `_compile_jinja_template`, with limits.

    Raises:
        UnsupportedError: a jinja2 whose sandbox has known escapes.
    """
    version = importlib.metadata.version("jinja2")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < _MIN_JINJA2:
        raise UnsupportedError(
            f"jinja2 {version} has known sandbox escapes; install jinja2>=3.1.6"
        )
    return _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
    )


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: puts marks around its content."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_wrap")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _wrap(self, caller: Callable[[], str]) -> str:
        return f"{OPEN_GENERATION}{caller()}{CLOSE_GENERATION}"


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Transformers' sandbox; unsafe attributes raise at once, a budget limits the work."""

    intercepted_binops = frozenset({"+", "-", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        """Sets up the filters and globals that chat templates expect."""
        self.budget = Budget()
        self._is_safe: dict[tuple[type, str], bool] = {}
        super().__init__(**options, finalize=self.budget.finalize)
        self.filters["tojson"] = _tojson
        self.filters = {
            name: metered_filter(self.budget, name, filter)
            for name, filter in self.filters.items()
            if name not in _REMOVED_FILTERS
        } | node_filters(self.budget)
        self.globals = {
            "dict": _TemplateDict(),
            "namespace": _TemplateNamespace,
            "range": self.globals["range"],
            "raise_exception": _raise_exception,
            "strftime_now": PINNED_DATE.strftime,
        }

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(
            f"access to attribute {attribute!r} of {type(obj).__name__!r} is unsafe"
        )

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is jinja2.runtime.LoopContext and attribute in _LOOP_ATTRIBUTES:
            return getattr(obj, attribute)  # most frequent, and always safe
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        key = type(obj), attr  # jinja2's answer depends on nothing else
        if key not in self._is_safe:
            if len(self._is_safe) >= _MAX_CACHED:
                self._is_safe.clear()
            self._is_safe[key] = super().is_safe_attribute(obj, attr, value)
        return self._is_safe[key]

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        if operator == "+" and type(left) is type(right) is str:  # the usual case
            self.budget.spend(len(left) + len(right))
            return left + right
        self.budget.binop(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(
        __self,  # a template may pass a keyword argument named `self`
        __context: jinja2.runtime.Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        args = charge_call(__self.budget, __obj, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        return __self.budget.charge_result(result)

    def _generate(
        self, source: jinja2.nodes.Template, *args: Any, **kwargs: Any
    ) -> str:
        return super()._generate(rewrite(source), *args, **kwargs)


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        x,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


class _TemplateDict:
    """`dict` for templates, without the other attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(jinja2.utils.Namespace):
    """`namespace` for templates; refuses names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace attribute named {name!r}")
