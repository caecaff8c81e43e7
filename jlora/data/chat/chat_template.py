"""A model's chat template: messages in, text and its control tokens out."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.nodes
from jinja2.exceptions import SecurityError

from jlora.data.chat.control_tokens import Rendered, control_pattern, mark, unmark
from jlora.data.chat.jinja_sandbox import make_environment
from jlora.data.read.jsonl import RowError
from jlora.errors import CorruptError, nearest

KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatTemplate:
    """A compiled template; renders as transformers' `apply_chat_template` does."""

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str],
        added_tokens: Mapping[str, bool],
    ) -> None:
        """Compiles the template.

        Args:
            source: jinja2 text.
            special_tokens: Variables of the template, such as bos_token.
            added_tokens: Text of each added token -> whether it is special.

        Raises:
            CorruptError: the template has a syntax error.
        """
        environment = make_environment()
        self._budget = environment.budget
        try:
            self._template = environment.from_string(source)
            # A dictionary, as each rendering copies them, which a ChainMap does slowly.
            self._template.globals = dict(self._template.globals)
            tree = environment.parse(source)
        except (jinja2.TemplateSyntaxError, RecursionError) as error:
            line = getattr(error, "lineno", None)
            where = f", line {line}" if line else ""
            raise CorruptError(f"chat template{where}: {error}") from error
        self._special_tokens = dict(special_tokens)
        self._literals = _literals(tree)
        self.has_generation = _GENERATION.search(source) is not None
        """Whether the template itself marks what the assistant says."""
        self.prints_date = "strftime_now" in source
        """Whether the text may hold a date; it is `sandbox.PINNED_DATE`."""
        self.controls = frozenset(
            text
            for text, special in added_tokens.items()
            if special or (text in self._literals and not text.isspace())
        )
        """Strings that only the template may turn into control tokens."""
        self._pattern = control_pattern(self.controls)

    def check_roles(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Raises RowError for a role that neither the template nor the world knows."""
        for index, message in enumerate(messages):
            role = message["role"]
            if role not in KNOWN_ROLES and role not in self._literals:
                raise RowError(
                    f"message {index} has the unknown role {role!r}"
                    f"{nearest(role, KNOWN_ROLES)}"
                )

    def conversation(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> "Conversation":
        """Returns what `Conversation.render` makes text of.

        Raises:
            RowError: text that cannot be written as UTF-8.
        """
        marked = [
            {
                key: mark(value, self._pattern)
                for key, value in message.items()
                if value is not None
            }
            for message in messages
        ]
        variables = {
            **self._special_tokens,
            "tools": None if tools is None else mark(list(tools), self._pattern),
            "documents": None,
        }
        return Conversation(self, marked, variables)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """Returns messages as text; raises as `conversation` and its `render`."""
        return self.conversation(messages, tools).render(
            add_generation_prompt=add_generation_prompt
        )

    def fill(self, variables: dict[str, Any]) -> Rendered:
        """Returns the text that the template makes of its variables; see `render`."""
        return unmark(self._stream(variables), self.controls)

    def _stream(self, variables: dict[str, Any]) -> str:
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


@dataclass(frozen=True)
class Conversation:
    """Messages with their control strings marked, once for all that is rendered of them.

    The sandbox keeps a template from changing them.
    """

    template: ChatTemplate
    messages: list[dict[str, Any]]
    variables: Mapping[str, Any]

    def render(
        self, count: int | None = None, *, add_generation_prompt: bool = False
    ) -> Rendered:
        """Returns the first `count` messages as text, or all of them.

        Raises:
            RowError: the template refuses this conversation.
            CorruptError: the template does what no template needs to do.
        """
        return self.template.fill(
            {
                **self.variables,
                "messages": self.messages[:count],
                "add_generation_prompt": add_generation_prompt,
            }
        )


def _literals(tree: jinja2.nodes.Template) -> str:
    """All text that the template can write by itself, joined by NUL."""
    texts = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
    texts += [
        node.value
        for node in tree.find_all(jinja2.nodes.Const)
        if isinstance(node.value, str)
    ]
    return "\0".join(texts)
