"""Answers whose thought the chat template opens, and drops once the answer is finished.

As DeepSeek-R1-Distill's: the prompt for an answer ends in <think>, and of a finished answer
only what follows </think> is written. An answer with a thought is trained on whole, as the
model is to write it after the prompt; one without, as the template writes it.
"""

from collections.abc import Mapping
from typing import Any

from jlora.data.chat.chat_template import ChatTemplate
from jlora.data.chat.control_tokens import Rendered


def keep_thought(
    message: Mapping[str, Any],
    template: ChatTemplate,
    whole: Rendered,
    before: Rendered,
) -> tuple[Rendered, Rendered] | None:
    """Returns the text up to the answer's first trained word, and the text with all of it.

    Args:
        message: the last message, an answer.
        template: of the conversation.
        whole: the conversation with it, as the template writes it.
        before: the prompt for it.

    Returns:
        None if the template does something else with the answer.
    """
    content = message.get("content")
    pairs = enumerate(zip(whole.text, before.text, strict=False))
    common = next((i for i, (a, b) in pairs if a != b), len(before.text))
    opened, end = before.text[common:], template.end_of_turn(whole.text)
    if not isinstance(content, str) or not opened.strip() or end < common:
        return None
    if not content.rstrip().endswith(whole.text[common:end].strip()):
        return None
    thought = content.lstrip()
    if not thought.startswith(opened.strip()):
        return _cut(whole, common), whole
    space = opened[len(opened.rstrip()) :]
    rest = thought.removeprefix(opened.strip()).removeprefix(space)
    answer, by = template.as_answer(rest), len(before.text)
    upto = Rendered(
        before.text + answer.text + whole.text[end:],
        data_controls=(
            *before.data_controls,
            *((a + by, b + by) for a, b in answer.data_controls),
        ),
        boundaries=(*before.boundaries, *(b + by for b in answer.boundaries)),
    )
    return before, upto


def _cut(rendered: Rendered, end: int) -> Rendered:
    """Returns the first `end` characters."""
    return Rendered(
        rendered.text[:end],
        data_controls=tuple(s for s in rendered.data_controls if s[1] <= end),
        boundaries=tuple(b for b in rendered.boundaries if b <= end),
    )
