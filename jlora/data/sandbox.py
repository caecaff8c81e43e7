"""The jinja2 environment of Hugging Face's chat templates, with limits on sizes."""

import importlib.metadata
import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
from jinja2.exceptions import SecurityError, TemplateError

from jlora.data.control import CLOSE_GENERATION, OPEN_GENERATION
from jlora.errors import UnsupportedError

# Llama 3.2's template prints today's date; its own fallback is this day. Pinned, so
# that neither the data nor a resumed run depends on the clock.
PINNED_DATE = datetime(2024, 7, 26)
MAX_OUTPUT_CHARS = 32 << 20
_MAX_ITEMS = 1 << 20
_MAX_BITS = 4096
_MIN_JINJA2 = (3, 1, 6)
_SIZED = (str, list, tuple)


def make_environment() -> jinja2.Environment:
    """Returns an environment equal to transformers' `_compile_jinja_template`.

    Raises:
        UnsupportedError: a jinja2 whose sandbox has known escapes.
    """
    version = importlib.metadata.version("jinja2")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < _MIN_JINJA2:
        raise UnsupportedError(
            f"jinja2 {version} has known sandbox escapes; install jinja2>=3.1.6"
        )
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.filters["format"] = _format
    for name in ("tojson", "center", "indent", "format"):
        environment.filters[name] = _bounded(environment.filters[name])
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = PINNED_DATE.strftime
    environment.globals["dict"] = _TemplateDict()
    environment.globals["namespace"] = _TemplateNamespace
    return environment


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: leaves marks around its content."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_wrap")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _wrap(self, caller: Callable[[], str]) -> str:
        return f"{OPEN_GENERATION}{caller()}{CLOSE_GENERATION}"


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """HF's sandbox; an unsafe attribute raises at once and sizes are bounded."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(
            f"access to attribute {attribute!r} of {type(obj).__name__!r} is unsafe"
        )

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        if _is_too_large(operator, left, right):
            raise SecurityError(f"the result of {operator!r} is too large")
        return super().call_binop(context, operator, left, right)

    def call(
        __self,  # not `self`: a template may pass a keyword of that name
        __context: jinja2.runtime.Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        _check_arguments(*args, *kwargs.values())
        # The base class wraps str.format and str.format_map, and nothing else.
        template = getattr(getattr(__obj, "__wrapped__", None), "__self__", None)
        if isinstance(template, str) and _has_wide_field(template):
            raise SecurityError("a format string with a width above 999,999")
        return super().call(__context, __obj, *args, **kwargs)


def _is_too_large(operator: str, left: Any, right: Any) -> bool:
    if operator == "%":
        return isinstance(left, str) and (_has_wide_field(left) or _has_huge(right))
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        if operator == "**":
            return bits * right > _MAX_BITS
        return operator == "*" and bits + right.bit_length() > _MAX_BITS
    if operator == "+" and isinstance(left, _SIZED) and isinstance(right, _SIZED):
        return len(left) + len(right) > MAX_OUTPUT_CHARS
    if operator == "*":
        for items, times in ((left, right), (right, left)):
            if isinstance(items, _SIZED) and isinstance(times, int):
                return len(items) * times > _MAX_ITEMS
    return False


def _has_huge(*values: Any) -> bool:
    return any(
        _has_huge(*value)
        if isinstance(value, tuple)
        else isinstance(value, int) and abs(value) > _MAX_ITEMS
        for value in values
    )


def _has_wide_field(format_string: str) -> bool:
    return re.search(r"\d{7}", format_string) is not None


def _check_arguments(*values: Any) -> None:
    if _has_huge(*values):
        raise SecurityError(f"a call with a number above {_MAX_ITEMS:,}")


def _bounded(filter: Callable[..., Any]) -> Callable[..., Any]:
    def bounded(value: Any, *args: Any, **kwargs: Any) -> Any:
        _check_arguments(*args, *kwargs.values())
        return filter(value, *args, **kwargs)

    return bounded


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    if _has_wide_field(value):
        raise SecurityError("a format string with a width above 999,999")
    return jinja2.filters.do_format(value, *args, **kwargs)


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
    """`dict` without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(jinja2.utils.Namespace):
    """`namespace` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _TemplateNamespace._check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _TemplateNamespace._check_name(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check_name(name: str) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace attribute named {name!r}")
