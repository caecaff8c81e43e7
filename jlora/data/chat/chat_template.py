"""A model's chat template: renders messages as Transformers does, in a sandbox."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.nodes
from jinja2.exceptions import SecurityError

from jlora.data.chat.control_tokens import Rendered, control_pattern, mark, unmark
from jlora.data.chat.jinja_sandbox import make_environment
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
    ) -> None:
        """Compiles jinja2 text; raises CorruptError for a syntax error.

        Args:
            source: the text.
            special_tokens: variables of the template, such as bos_token.
            added_tokens: text of each added token -> whether it is special.
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
        self._literals = _string_literals(tree)
        texts = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
        written = "\0".join([*texts, *self._literals])
        self.has_generation = _GENERATION.search(source) is not None
        """Whether the template itself marks the assistant's text."""
        self.prints_date = "strftime_now" in source
        """Whether the text may hold a date; it is `jinja_sandbox.PINNED_DATE`."""
        self.controls = frozenset(
            text
            for text, special in added_tokens.items()
            if special or (text in written and not text.isspace())
        )
        """Strings that only the template may turn into control tokens."""
        self._pattern = control_pattern(self.controls)

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
        """Returns the template's variables for a conversation, control strings marked.

        They may be rendered several times, as the sandbox keeps a template from changing
        them. Raises RowError for text that cannot be written as UTF-8.
        """
        return {
            **self._special_tokens,
            "messages": [
                {
                    key: mark(value, self._pattern)
                    for key, value in message.items()
                    if value is not None
                }
                for message in messages
            ],
            "tools": None if tools is None else mark(list(tools), self._pattern),
            "documents": None,
        }

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
        parts: list[str] = []
        spend = self._budget.spend
        self._budget.restart()
        try:
            context = self._template.new_context(
                {
                    **variables,
                    "messages": variables["messages"][:count],
                    "add_generation_prompt": add_generation_prompt,
                }
            )
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
        return unmark("".join(parts), self.controls)


def _string_literals(tree: jinja2.nodes.Template) -> frozenset[str]:
    """Returns every string that the template's code holds, except the empty one."""
    values = [node.value for node in tree.find_all(jinja2.nodes.Const)]
    return frozenset(value for value in values if value and isinstance(value, str))
