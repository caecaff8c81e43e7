"""Gives a chat template the shapes of messages that it expects.

Tool-call arguments may be JSON text or an object, and a content a string or a list of
text parts. Templates differ in which they can write, so each is tried once.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

from jlora.data.read.bad_rows import RowError
from jlora.errors import JloraError

Message = dict[str, Any]
_ARGUMENTS = '{"place": "here"}'
QUESTION: Message = {"role": "user", "content": "Whereabouts?"}


def tool_call(arguments: object) -> Message:
    """Returns a message that calls a tool."""
    function = {"name": "locate", "arguments": arguments}
    # The id is as long as Mistral's templates demand.
    call = {"id": "abcdefghi", "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


@dataclass(frozen=True)
class MessageShapes:
    """What a chat template can write."""

    text_arguments: bool
    """Whether arguments that are JSON text are written as they are, not escaped."""
    parts: bool
    """Whether it writes the texts of a content that is a list of parts."""

    def fit(self, message: Message) -> Message:
        """Returns the message in the template's shapes.

        Raises:
            RowError: arguments that are no JSON object, where one is needed.
        """
        content = message.get("content")
        if _is_parts(content) and not self.parts:
            message = {**message, "content": "".join(part["text"] for part in content)}
        calls = message.get("tool_calls")
        if self.text_arguments or not isinstance(calls, list):
            return message
        return {**message, "tool_calls": [_with_object(call) for call in calls]}


def find_shapes(render: Callable[[list[Message]], str]) -> MessageShapes:
    """Returns what a template can write; `render` raises a JloraError for what it refuses."""

    def text_of(*messages: Message) -> str:
        try:
            return render([*messages])
        except JloraError:
            return ""

    part = {"type": "text", "text": QUESTION["content"]}
    in_parts = text_of({"role": "user", "content": [part]})
    return MessageShapes(
        text_arguments=_ARGUMENTS in text_of(QUESTION, tool_call(_ARGUMENTS)),
        parts=in_parts != "" and in_parts == text_of(QUESTION),
    )


def _is_parts(content: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    )


def _with_object(call: Any) -> Any:
    """Returns a tool call whose arguments are an object."""
    try:
        arguments = call["function"]["arguments"]
    except (KeyError, TypeError):  # whatever the template makes of it
        return call
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise RowError(
            f"the arguments {arguments!r:.80} of a tool call are no JSON object, and the "
            "chat template would escape them as text"
        )
    return {**call, "function": {**call["function"], "arguments": parsed}}
