"""A model's chat template: renders messages as Transformers does, in a sandbox."""

import re
from collections.abc import Mapping, Sequence, Set
from functools import cached_property
from typing import Any

import jinja2
import jinja2.nodes
from jinja2.exceptions import SecurityError

from jlora.data.chat.control_tokens import (
    Rendered,
    control_pattern,
    mark,
    unmark,
    without_marks,
)
from jlora.data.chat.jinja_sandbox import make_environment
from jlora.data.chat.message_shapes import MessageShapes, find_shapes
from jlora.data.chat.turn_markers import find_turn_markers
from jlora.data.read.bad_rows import RowError
from jlora.errors import CorruptError, nearest

KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatTemplate:
    """A compiled chat template."""

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str],
        added_tokens: Mapping[str, bool],
        stop_tokens: Set[str] = frozenset(),
    ) -> None:
        """Compiles jinja2 text; raises CorruptError for a syntax error.

        Args:
            source: the text.
            special_tokens: variables of the template, such as bos_token.
            added_tokens: text of each added token -> whether it is special.
            stop_tokens: those that end a generated text.
        """
        environment = make_environment()
        self._budget = environment.budget
        try:
            self._template = environment.from_string(source)
            # A dictionary, because each rendering copies it and a ChainMap is slow.
            self._template.globals = dict(self._template.globals)
            tree = environment.parse(source)
        except (jinja2.TemplateSyntaxError, RecursionError) as error:
            line = getattr(error, "lineno", None)
            where = f", line {line}" if line else ""
            raise CorruptError(f"chat template{where}: {error}") from error
        self._special_tokens = dict(special_tokens)
        named = set(special_tokens.values())
        self._added_tokens = {
            text: special or text in named for text, special in added_tokens.items()
        }
        self._stop_tokens = stop_tokens
        self._literals = _string_literals(tree)
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
        variables |= {"tools": None, "documents": None, "add_generation_prompt": False}
        return without_marks(self._run(variables))

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
        text = self._run(
            {
                **variables,
                "messages": variables["messages"][:count],
                "add_generation_prompt": add_generation_prompt,
            }
        )
        return unmark(text, self.controls)

    def _run(self, variables: dict[str, Any]) -> str:
        """Returns what the template makes of its variables; raises as `render`."""
        parts: list[str] = []
        spend = self._budget.spend
        self._budget.restart()
        try:
            context = self._template.new_context(variables)
            for part in self._template.root_render_func(context):
                parts.append(part)
                spend(len(part))
        except (SecurityError, OverflowError, MemoryError, RecursionError) as error:
            raise CorruptError(
                f"chat template: stopped by the sandbox, {type(error).__name__}: "
                f"{error}; use another template"
            ) from error
        except RowError:
            raise
        except Exception as error:  # whatever the template's own code raises
            raise RowError(
                f"the chat template refuses it, {type(error).__name__}: {error}"
            ) from error
        return "".join(parts)


def _string_literals(tree: jinja2.nodes.Template) -> frozenset[str]:
    """Returns every string that the template's code holds, except the empty one."""
    values = [node.value for node in tree.find_all(jinja2.nodes.Const)]
    return frozenset(value for value in values if value and isinstance(value, str))
