"""Chat templates as Transformers' own jinja2 environment renders them.

`chat_template` calls these functions in a limited process, which is what keeps a template
from running for ever; the sandbox keeps it from reaching Python. So this module imports
little.
"""

import functools
import json
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
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

# Lone surrogates, as no valid text has them.
OPEN_GENERATION, CLOSE_GENERATION = "\udc03", "\udc04"
# "Today" for templates that print the date: the fallback of Llama 3.2's own template.
# Pinned, so that neither the data nor a resumed run depends on the clock.
PINNED_DATE = datetime(2024, 7, 26)
# Bounds the cache of `is_safe_attribute`, as a template may ask for any name.
_MAX_CACHED = 1000
_LOOP_ATTRIBUTES = frozenset({"first", "last", "index", "index0"})
# Types whose text holds a memory address.
_FUNCTIONS = frozenset(
    {
        types.FunctionType,
        types.MethodType,
        types.BuiltinMethodType,
        jinja2.runtime.BlockReference,
    }
)


def find_literals(source: str) -> list[str]:
    """Returns every string that a template's code holds, except the empty one.

    Raises:
        TemplateError: a syntax error; the message begins with its line.
    """
    try:
        _compiled(source)
        tree = _environment().parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"line {error.lineno}: {error}") from error
    values = [node.value for node in tree.find_all(jinja2.nodes.Const)]
    return [value for value in values if value and isinstance(value, str)]


def render(
    sources: Sequence[str],
    index: int,
    variables: Mapping[str, Any],
    cuts: Sequence[tuple[int | None, bool]],
) -> list[str | int | dict[str, str]]:
    """Returns the text that template `index` makes of a conversation for each of `cuts`.

    A cut is how many of the messages are rendered (None: all), and whether the beginning
    of an answer follows. A text with which the first one begins is its length only; of
    what the template refuses the reason is returned, as {"refused": reason}.

    Raises:
        SecurityError, OverflowError, RecursionError: the template broke a rule.
    """
    template, messages = _compiled(sources[index]), variables["messages"]
    results: list[str | int | dict[str, str]] = []
    for count, add_generation_prompt in cuts:
        prefix = {
            **variables,
            "messages": messages[:count],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = "".join(template.root_render_func(template.new_context(prefix)))
        except (SecurityError, OverflowError, MemoryError, RecursionError):
            raise
        except Exception as error:  # whatever the template's own code raises
            results.append({"refused": _reason(template, error)})
            continue
        whole = results[0] if results else None
        is_prefix = isinstance(whole, str) and whole.startswith(text)
        results.append(len(text) if is_prefix else text)
    return results


def _reason(template: jinja2.Template, error: Exception) -> str:
    frames = traceback.walk_tb(error.__traceback__)
    own = [n for f, n in frames if f.f_code.co_filename == "<template>"]
    line = template.get_corresponding_lineno(own[-1])
    return f"line {line}, {type(error).__name__}: {error}"


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    template = _environment().from_string(source)
    # A dictionary, because each rendering copies it and a ChainMap is slow.
    template.globals = dict(template.globals)
    return template


@functools.cache
def _environment() -> "_Sandbox":
    """Returns the environment of transformers' `_compile_jinja_template`."""
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
    """Transformers' sandbox; what is unsafe, or differs from run to run, raises at once."""

    def __init__(self, **options: Any) -> None:
        """Sets up the filters and globals that chat templates expect."""
        self._is_safe: dict[tuple[type, str], bool] = {}
        super().__init__(**options)
        self.filters["tojson"] = _tojson
        del self.filters["random"]
        self.filters = {k: _without_address(f) for k, f in self.filters.items()}
        self.globals = {
            "dict": _TemplateDict(),
            "namespace": _TemplateNamespace,
            "range": _Function(self.globals["range"]),
            "raise_exception": _Function(_raise_exception),
            "strftime_now": _Function(PINNED_DATE.strftime),
        }

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(
            f"access to attribute {attribute!r} of {type(obj).__name__!r} is unsafe"
        )

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is jinja2.runtime.LoopContext and attribute in _LOOP_ATTRIBUTES:
            return getattr(obj, attribute)  # most frequent, and always safe
        inner = obj._value if isinstance(obj, _Unprintable) else obj
        value = super().getattr(inner, attribute)
        return _Function(value) if type(value) in _FUNCTIONS else value

    def getitem(self, obj: Any, argument: Any) -> Any:
        value = super().getitem(obj, argument)
        return _Function(value) if type(value) in _FUNCTIONS else value

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        key = type(obj), attr  # jinja2's answer depends on nothing else
        if key not in self._is_safe:
            if len(self._is_safe) >= _MAX_CACHED:
                self._is_safe.clear()
            self._is_safe[key] = super().is_safe_attribute(obj, attr, value)
        return self._is_safe[key]


class _Unprintable:
    """Something whose text would be a memory address, which differs from run to run."""

    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value

    def __repr__(self) -> str:
        raise SecurityError("the text of a function or an iterator is an address")


class _Function(_Unprintable):
    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._value(*args, **kwargs)


class _Iterator(_Unprintable):
    __slots__ = ()

    def __iter__(self) -> Any:
        return iter(self._value)


def _without_address(filter: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(filter)  # also copies what jinja2 notes on the function
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = filter(*args, **kwargs)
        return _Iterator(result) if hasattr(result, "__next__") else result

    return wrapped


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


def _raise_exception(message: Any) -> NoReturn:
    raise TemplateError(str(message))


class _TemplateDict:
    """`dict` for templates, without the other attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def __repr__(self) -> str:
        return repr(dict)

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
