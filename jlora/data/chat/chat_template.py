"""A model's chat template: renders messages as Transformers does, in a limited process."""

import importlib.metadata
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from jlora.data.chat.control_tokens import (
    Rendered,
    control_pattern,
    mark,
    unmark,
    without_marks,
)
from jlora.data.chat.message_shapes import MessageShapes, find_shapes
from jlora.data.chat.turn_markers import find_turn_markers
from jlora.data.read.bad_rows import RowError
from jlora.errors import CorruptError, UnsupportedError, listing, nearest
from jlora.limited_process import CallError, LimitedProcess, LimitExceeded

KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
CPU_SECONDS = 3.0
MEMORY_BYTES = 1 << 30
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MIN_JINJA2 = (3, 1, 6)
# One process for all templates: each call brings its template along.
_PROCESS = LimitedProcess("jlora.data.chat.jinja_sandbox", memory_bytes=MEMORY_BYTES)
# How much of a conversation is rendered: the number of messages (None: all), and whether
# the beginning of an answer follows.
Cut = tuple[int | None, bool]
_WHOLE: Cut = (None, False)


class ChatTemplate:
    """A chat template that compiles."""

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str],
        added_tokens: Mapping[str, bool],
        stop_tokens: Set[str] = frozenset(),
        name: str = "chat template",
    ) -> None:
        """Compiles jinja2 text.

        Args:
            source: the text.
            special_tokens: variables of the template, such as bos_token.
            added_tokens: text of each added token -> whether it is special.
            stop_tokens: those that end a generated text.
            name: what messages call the template.

        Raises:
            CorruptError: a syntax error, or it takes too much time or memory.
            UnsupportedError: a jinja2 whose sandbox has known escapes.
        """
        _check_jinja2()
        self.source, self.name = source, name
        self._special_tokens = dict(special_tokens)
        named = set(special_tokens.values())
        self._added_tokens = {
            text: special or text in named for text, special in added_tokens.items()
        }
        self._stop_tokens = stop_tokens
        (literals,) = _call(name, "find_literals", [], [[source]])
        self._literals = frozenset(literals)
        self.has_generation = _GENERATION.search(source) is not None
        """Whether the template itself marks the assistant's text."""
        self.prints_date = "strftime_now" in source
        """Whether the text may hold a date; it is `jinja_sandbox.PINNED_DATE`."""

    @cached_property
    def turn_markers(self) -> frozenset[str]:
        """Control tokens that begin or end a text or a turn; they stay text in any message."""
        special = {text for text, special in self._added_tokens.items() if special}
        named = {self._special_tokens.get(name) for name in ("bos_token", "eos_token")}
        found = find_turn_markers(self._render_plain, self._added_tokens)
        ends = special.intersection(named | self._stop_tokens)
        return frozenset(special if found is None else found | ends)

    @cached_property
    def controls(self) -> frozenset[str]:
        """Control tokens that stay text in all messages but the assistant's own.

        These are the special tokens, and what begins or ends a turn. Other added tokens,
        such as <think>, are words of the vocabulary, as in Transformers.
        """
        special = {text for text, special in self._added_tokens.items() if special}
        return self.turn_markers | special

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return control_pattern(self.controls)

    @cached_property
    def _assistant_pattern(self) -> re.Pattern[str]:
        return control_pattern(self.turn_markers)

    def check_roles(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Raises RowError for a role that is neither a usual one nor a string in the template."""
        for index, message in enumerate(messages):
            role = message["role"]
            if role not in KNOWN_ROLES and role not in self._literals:
                raise RowError(
                    f"message {index} has the unknown role {role!r}"
                    f"{nearest(role, KNOWN_ROLES)}"
                )

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> dict[str, Any]:
        """Returns the template's variables for a conversation, marked where text stays text.

        They may be rendered several times, as the sandbox keeps a template from changing
        them. Raises RowError for text that cannot be written as UTF-8, and for tool-call
        arguments that the template would escape.
        """
        return {
            **self._special_tokens,
            "messages": [self._marked(message) for message in messages],
            "tools": None if tools is None else mark(list(tools), self._pattern),
            "documents": None,
        }

    def as_answer(self, content: str) -> Rendered:
        """Returns the text of an answer as it is, with what must stay text in it."""
        return unmark(mark(content, self._assistant_pattern), self.controls)

    def end_of_turn(self, text: str) -> int:
        """Returns where a text's last turn marker begins, -1 without one."""
        found = [text.rfind(marker) for marker in self.turn_markers]
        return max(found, default=-1)

    @cached_property
    def _shapes(self) -> MessageShapes:
        return find_shapes(self._render_plain)

    def _marked(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if "tool_calls" in message or isinstance(message.get("content"), list):
            message = self._shapes.fit(dict(message))
        is_own = message.get("role") == "assistant"
        pattern = self._assistant_pattern if is_own else self._pattern
        return {
            key: mark(value, pattern)
            for key, value in message.items()
            if value is not None
        }

    def _render_plain(self, messages: list[dict[str, Any]]) -> str:
        """Returns messages without control strings as text."""
        variables = {**self._special_tokens, "messages": messages}
        variables |= {"tools": None, "documents": None}
        (results,) = _render([Prefixes(self, variables, [_WHOLE])])
        return without_marks(_text(self, results, _WHOLE))

    def render(
        self,
        variables: Mapping[str, Any],
        count: int | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """Returns the first `count` messages (None: all) of `prepare` as text.

        Raises:
            RowError: the template refuses this conversation.
            CorruptError: the template broke a rule or a limit of the sandbox.
        """
        prefix = Prefixes(self, variables, [(count, add_generation_prompt)])
        (render,) = render_prefixes([prefix])
        return render(count, add_generation_prompt)


@dataclass(frozen=True)
class Prefixes:
    """What to render of a conversation."""

    template: ChatTemplate
    variables: Mapping[str, Any]
    """As `ChatTemplate.prepare` returns them."""
    cuts: Sequence[Cut]


def render_prefixes(
    conversations: Sequence[Prefixes],
) -> list[Callable[..., Rendered]]:
    """Returns a function for each conversation that renders as `ChatTemplate.render` does.

    It takes the count and add_generation_prompt of a cut. All is rendered at once, which
    is much faster than one by one.

    Raises:
        CorruptError: a template broke a rule or a limit of the sandbox.
    """
    results = _render(conversations)
    return [
        partial(_look_up, prefixes.template, found)
        for prefixes, found in zip(conversations, results, strict=True)
    ]


def _render(conversations: Sequence[Prefixes]) -> list[dict[Cut, Any]]:
    """Returns for each conversation what `jinja_sandbox.render` makes of each cut."""
    templates = list(dict.fromkeys(prefixes.template for prefixes in conversations))
    # Each cut renders nearly all of a long conversation.
    most = max((len(prefixes.cuts) for prefixes in conversations), default=0)
    results = _call(
        listing(list(dict.fromkeys(template.name for template in templates))),
        "render",
        [[template.source for template in templates]],
        [(templates.index(p.template), p.variables, p.cuts) for p in conversations],
        cpu_seconds=CPU_SECONDS * (1 + most / 100),
    )
    return [
        dict(zip(prefixes.cuts, found, strict=True))
        for prefixes, found in zip(conversations, results, strict=True)
    ]


def _look_up(
    template: ChatTemplate,
    results: dict[Cut, Any],
    count: int | None = None,
    add_generation_prompt: bool = False,
) -> Rendered:
    text = _text(template, results, (count, add_generation_prompt))
    return unmark(text, template.controls)


def _text(template: ChatTemplate, results: dict[Cut, Any], cut: Cut) -> str:
    """Returns the text of a cut, with its marks."""
    text = results[cut]
    if isinstance(text, dict):
        raise RowError(f"the {template.name} refuses it: {text['refused']}")
    # A number is a length of the first text.
    return next(iter(results.values()))[:text] if isinstance(text, int) else text


def _call(
    name: str,
    function: str,
    common: Sequence[Any],
    calls: Sequence[Sequence[Any]],
    *,
    cpu_seconds: float = CPU_SECONDS,
) -> list[Any]:
    try:
        return _PROCESS.call_each(function, common, calls, cpu_seconds=cpu_seconds)
    except (CallError, LimitExceeded) as error:
        kind = getattr(error, "name", "")
        if kind == "TemplateError":  # a syntax error, with its line
            raise CorruptError(f"{name}, {error}") from error
        why = f"stopped by the sandbox, {kind}: {error}" if kind else str(error)
        raise CorruptError(f"{name}: {why}; use another template") from error


def _check_jinja2() -> None:
    version = importlib.metadata.version("jinja2")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < _MIN_JINJA2:
        raise UnsupportedError(
            f"jinja2 {version} has known sandbox escapes; install jinja2>=3.1.6"
        )
