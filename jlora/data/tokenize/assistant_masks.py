"""Which tokens of a conversation the assistant said.

A template may mark that itself with generation blocks. Where it does not, the
conversation is rendered up to the start and up to the end of each answer, and what
lies between is the answer; templates that rewrite earlier turns are refused.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jlora.data.chat.chat_template import Conversation
from jlora.data.chat.control_tokens import Encoded, Rendered, Span
from jlora.data.read.jsonl import RowError
from jlora.data.read.records import ChatRecord
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import UnsupportedError


@dataclass(frozen=True)
class Turn:
    """Message `index`: all text up to its content, and up to its end."""

    index: int
    head: Rendered
    upto: Rendered


@dataclass(frozen=True)
class Plan:
    """What to encode for one conversation to find its tokens and mask."""

    number: int
    whole: Rendered
    turns: tuple[Turn, ...] = ()
    marked: tuple[Span, ...] = ()
    """Characters to learn, where the template marks them."""
    everything: bool = False

    def texts(self) -> list[Rendered]:
        """Returns all texts that `find_spans` will ask the ids of."""
        return [self.whole, *(r for turn in self.turns for r in (turn.head, turn.upto))]


def plan_conversation(
    record: ChatRecord, tokenizer: Tokenizer, *, train_on: str, where: str
) -> Plan:
    """Returns the texts whose tokens decide the mask.

    Raises:
        RowError: the template refuses this conversation.
        UnsupportedError: the template rewrites earlier turns; `where` names the record.
    """
    template = tokenizer.template(record.tools)
    messages = record.messages
    template.check_roles(messages)
    conversation = template.conversation(messages, record.tools)
    whole = conversation.render()
    if train_on == "all":
        return Plan(record.number, whole, everything=True)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if train_on == "completion" and record.num_prompt:
        answers = [i for i in answers if i >= record.num_prompt]
    elif train_on != "assistant":
        # Without a column for the prompt, the completion is the last answer.
        answers = answers[-1:]
    if not answers:
        return Plan(record.number, whole)
    if template.has_generation:
        marked = _marked_spans(conversation, whole, answers[0], where)
        return Plan(record.number, whole, marked=marked)
    turns = tuple(_turn(conversation, whole, i, where) for i in answers)
    return Plan(record.number, whole, turns)


def find_spans(
    plan: Plan, tokenizer: Tokenizer, encoded: Callable[[Rendered], Encoded]
) -> tuple[Encoded, list[Span], bool]:
    """Returns the whole, spans of tokens to learn, and whether a token ends every answer.

    Raises:
        RowError: an answer shares a token with its surroundings, or BOS comes twice.
    """
    whole = encoded(plan.whole)
    ids = whole.ids
    if tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2:
        raise RowError("the chat template writes the BOS token twice")
    if plan.everything:
        return whole, [(0, len(ids))], True
    if plan.marked:
        spans = _to_tokens(plan.marked, whole.offsets)
        ends = tokenizer.control_ids
        all_end = all(not ends.isdisjoint(ids[start:end]) for start, end in spans)
        return whole, spans, all_end
    spans, all_end = [], True
    for turn in plan.turns:
        pair = encoded(turn.head), encoded(turn.upto)
        first = min(end.shared for end in pair)
        head, upto = (ids[first : end.shared] + end.ids for end in pair)
        if upto[: len(head)] != head:
            raise RowError(
                f"message {turn.index}: the answer's first characters share a token "
                "with the turn's header (does it begin with white space?)"
            )
        end, has_end = _turn_end(upto, len(head), tokenizer)
        if ids[first : first + end] != upto[:end]:
            raise RowError(
                f"message {turn.index}: the answer's last characters share a token "
                "with the next turn"
            )
        spans.append((first + len(head), first + end))
        all_end = all_end and has_end
    return whole, spans, all_end


def _turn(conversation: Conversation, whole: Rendered, index: int, where: str) -> Turn:
    """Renders up to both ends of an answer and checks that both stay as they are."""
    upto = whole
    if index + 1 < len(conversation.messages):
        upto = conversation.render(index + 1)
    try:
        head = conversation.render(index, add_generation_prompt=True)
        is_stable = upto.text.startswith(head.text)
    except RowError:
        if index:
            raise
        head, is_stable = upto, False
    if index == 0 and not is_stable:
        raise RowError(
            "the conversation begins with an assistant turn, and the chat template "
            "does not show where its content starts"
        )
    if not is_stable or not whole.text.startswith(upto.text):
        raise _unstable(where, index)
    return Turn(index, head, upto)


def _marked_spans(
    conversation: Conversation, whole: Rendered, first: int, where: str
) -> tuple[Span, ...]:
    """The generation blocks of message `first` and later ones."""
    earlier = conversation.messages[:first]
    if not any(message["role"] == "assistant" for message in earlier):
        return whole.generated
    before = conversation.render(first).generated
    if whole.generated[: len(before)] != before:
        raise _unstable(where, first)
    return whole.generated[len(before) :]


def _unstable(where: str, index: int) -> UnsupportedError:
    return UnsupportedError(
        f"{where}: the chat template changes earlier text when message {index} is "
        "added, so the answer's tokens cannot be told from the others; use "
        "data.train_on=all, a template with generation blocks "
        "({% generation %}...{% endgeneration %}), or one record per answer"
    )


def _turn_end(ids: Sequence[int], start: int, tokenizer: Tokenizer) -> tuple[int, bool]:
    """Returns where to stop learning: after the last control token, if there is one.

    Only white space may follow it. Without such a token, everything is learnt: the
    line break after the turn is then all that tells the model to stop.
    """
    for index in range(len(ids) - 1, start - 1, -1):
        if ids[index] in tokenizer.control_ids:
            if tokenizer.decode(ids[index + 1 :]).strip():
                break
            return index + 1, True
    return len(ids), False


def _to_tokens(spans: Sequence[Span], offsets: Sequence[Span]) -> list[Span]:
    """Returns spans of the tokens that share a character with a span of characters."""
    starts = [start for start, _ in offsets]
    ends = [end for _, end in offsets]
    return [
        (bisect_right(ends, start), bisect_left(starts, end))
        for start, end in spans
        if start < end
    ]
