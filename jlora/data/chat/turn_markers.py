"""Finds the control tokens with which a chat template begins and ends turns.

Only the template knows them, so it renders a few harmless conversations.
"""

from collections.abc import Callable, Mapping

from jlora.data.chat.control_tokens import control_pattern
from jlora.data.chat.message_shapes import QUESTION, Message, tool_call
from jlora.errors import JloraError

_SYSTEM: Message = {"role": "system", "content": "Orthographically."}
_ANSWER: Message = {"role": "assistant", "content": "Thereabouts."}
_NEXT: Message = {"role": "user", "content": "Notwithstanding?"}
_CALL = tool_call({"place": "here"})
_RESULT: Message = {
    "role": "tool",
    "name": "locate",
    "tool_call_id": "abcdefghi",
    "content": "Elsewhere.",
}


def find_turn_markers(
    render: Callable[[list[Message]], str], added_tokens: Mapping[str, bool]
) -> frozenset[str] | None:
    """Returns the added tokens around turns, or None for a template that hides them.

    Those within an answer, such as the `<think>` of an empty thought, are not among them.

    Args:
        render: from messages to text; raises a JloraError if the template refuses them.
        added_tokens: text of each added token -> whether it is special.
    """
    find = control_pattern(added_tokens.keys()).findall

    def text_of(*messages: Message) -> str:
        try:
            return render([*messages])
        except JloraError:
            return ""

    question, answer = QUESTION["content"], _ANSWER["content"]
    asked = text_of(QUESTION)
    if question not in asked:
        return None
    answered = text_of(QUESTION, _ANSWER)
    again = text_of(QUESTION, _ANSWER, _NEXT)
    if answer not in answered or answer not in again:
        return None
    between = again.partition(answer)[2].partition(_NEXT["content"])[0]
    head = answered.partition(answer)[0]
    markers = {
        *find(asked.partition(question)[2]),
        *find(answered.partition(answer)[2]),
        *find(between),
        *find(head.removeprefix(asked) if head.startswith(asked) else "")[:1],
    }
    # Elsewhere a template may also write of tokens, such as how to use <tool_call>.
    called = text_of(QUESTION, _CALL)
    returned = text_of(QUESTION, _CALL, _RESULT)
    perhaps = [
        *find(asked.partition(question)[0]),
        *find(text_of(_SYSTEM, QUESTION).partition(question)[0]),
        *find(called)[-1:],
        *find(returned.removeprefix(called))[:1],
        *find(returned)[-1:],
    ]
    return frozenset(markers.union(text for text in perhaps if added_tokens[text]))
