"""Finds the tokens of a conversation that the assistant wrote.

A template may mark them itself, with generation blocks. Otherwise the conversation is
rendered up to the start and up to the end of each answer, and what lies between is the
answer. Templates that change earlier turns are refused.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jlora.data.chat.chat_template import Cut, Prefixes, render_prefixes
from jlora.data.chat.control_tokens import Encoded, Rendered, Span
from jlora.data.read.bad_rows import RowError
from jlora.data.read.records import ChatRecord
from jlora.data.tokenize.kept_thoughts import keep_thought
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import UnsupportedError


@dataclass(frozen=True)
class Answer:
    """Message `index` of a conversation, rendered up to its content and to its end.

    Of a message that is to be masked where all else counts, up to its header.
    """

    index: int
    before: Rendered
    upto: Rendered


@dataclass(frozen=True)
class MaskPlan:
    """The texts to encode for one conversation, to find its tokens and its mask."""

    number: int
    whole: Rendered
    answers: tuple[Answer, ...] = ()
    marked: tuple[Span, ...] = ()
    """Characters to train on, where the template marks them."""
    everything: bool = False
    """Whether all counts but the `answers`."""
    opens_thought: bool = False
    """Whether the template opens the answer's thought, see `kept_thoughts`."""

    def texts(self) -> list[Rendered]:
        """Returns all texts whose ids `find_supervised_spans` needs."""
        return [self.whole, *(x for a in self.answers for x in (a.before, a.upto))]


@dataclass(frozen=True)
class _Conversation:
    record: ChatRecord
    answers: list[int]
    """The messages to train on."""
    prefixes: Prefixes
    """What to render."""


def plan_masks(
    records: Sequence[ChatRecord],
    tokenizer: Tokenizer,
    *,
    train_on: str,
    where: Callable[[int], str],
) -> list[MaskPlan | RowError]:
    """Renders conversations and the texts whose tokens decide their masks.

    A RowError is in place of a conversation that cannot be used. Raises UnsupportedError
    for a template that changes earlier turns; `where` names a record by its number.
    """
    plans: list[Any] = [_prepare(record, tokenizer, train_on) for record in records]
    chosen = [i for i, c in enumerate(plans) if isinstance(c, _Conversation)]
    renders = render_prefixes([plans[i].prefixes for i in chosen])
    for index, render in zip(chosen, renders, strict=True):
        conversation = plans[index]
        place = where(conversation.record.number)
        try:
            plans[index] = _plan_mask(conversation, render, train_on, place)
        except RowError as error:
            plans[index] = error
    return plans


def _prepare(
    record: ChatRecord, tokenizer: Tokenizer, train_on: str
) -> _Conversation | RowError:
    template = tokenizer.template(record.tools)
    messages = record.messages
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if train_on == "completion" and record.num_prompt:
        answers = [i for i in answers if i >= record.num_prompt]
    elif train_on != "assistant":
        # Without a column for the prompt, the completion is the last answer.
        answers = answers[-1:]
    answers = [i for i in answers if i not in record.untrained]
    cuts: list[Cut] = [(None, False)]
    if train_on == "all":
        cuts += [(end, False) for i in record.untrained for end in (i, i + 1) if end]
    elif template.has_generation:
        cuts += [(first, False) for first in answers[:1]]
    else:
        cuts += [(i, True) for i in answers]
        cuts += [(i + 1, False) for i in answers if i + 1 < len(messages)]
    try:
        template.check_roles(messages)
        variables = template.prepare(messages, record.tools)
    except RowError as error:
        return error
    cuts = list(dict.fromkeys(cuts))
    return _Conversation(record, answers, Prefixes(template, variables, cuts))


def _plan_mask(
    conversation: _Conversation,
    render: Callable[..., Rendered],
    train_on: str,
    where: str,
) -> MaskPlan:
    record, answers = conversation.record, conversation.answers
    messages = record.messages
    whole = render()
    if train_on == "all":
        turns = [_render_turn(i, render, where) for i in sorted(record.untrained)]
        return MaskPlan(record.number, whole, tuple(turns), everything=True)
    if not answers:
        return MaskPlan(record.number, whole)
    if conversation.prefixes.template.has_generation:
        assistant = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if record.untrained:
            marked = _choose_marked(whole, assistant, answers)
        else:
            marked = _marked_from(answers[0], whole, assistant, render, where)
        return MaskPlan(record.number, whole, marked=marked)
    rendered = []
    for index in answers:
        upto = whole if index + 1 == len(messages) else render(index + 1)
        answer = _render_answer(index, upto, render)
        if not answer or not whole.text.startswith(upto.text):
            kept = None
            if len(answers) == 1 and index + 1 == len(messages):
                template = conversation.prefixes.template
                before = render(index, True)
                kept = keep_thought(messages[index], template, whole, before)
            if kept is None:
                raise _unstable_template(where, index)
            before, upto = kept
            own = (Answer(index, before, upto),)
            return MaskPlan(record.number, upto, own, opens_thought=True)
        rendered.append(answer)
    return MaskPlan(record.number, whole, tuple(rendered))


def _marked_from(
    first: int,
    whole: Rendered,
    assistant: Sequence[int],
    render: Callable[..., Rendered],
    where: str,
) -> tuple[Span, ...]:
    """Returns what the template marks of message `first` and later ones."""
    earlier = render(first).generated if assistant[0] < first else ()
    if whole.generated[: len(earlier)] != earlier:
        raise _unstable_template(where, first)
    return whole.generated[len(earlier) :]


def _choose_marked(
    whole: Rendered, assistant: Sequence[int], answers: Sequence[int]
) -> tuple[Span, ...]:
    """Returns what the template marks of the answers alone."""
    if len(whole.generated) != len(assistant):
        raise RowError(
            f"the chat template marks {len(whole.generated)} texts of {len(assistant)} "
            "assistant turns, so it is not known which of them has which weight"
        )
    blocks = zip(assistant, whole.generated, strict=True)
    return tuple(block for index, block in blocks if index in answers)


def _render_turn(index: int, render: Callable[..., Rendered], where: str) -> Answer:
    """Renders up to the start and up to the end of a whole message, with its header."""
    before = render(index) if index else Rendered("")
    upto = render(index + 1)
    if not upto.text.startswith(before.text):
        raise _unstable_template(where, index)
    return Answer(index, before, upto)


def find_supervised_spans(
    plan: MaskPlan, tokenizer: Tokenizer, encode: Callable[[Rendered], Encoded]
) -> tuple[Encoded, list[Span], bool]:
    """Returns the encoded conversation and the spans of tokens that the loss counts.

    The third value is whether each span includes a control token that ends the answer.

    Raises:
        RowError: an answer shares a token with its surroundings, or BOS occurs twice.
    """
    whole = encode(plan.whole)
    ids = whole.ids
    if tokenizer.begins_with_two_bos(ids):
        raise RowError("the chat template writes the BOS token twice")
    if plan.everything:
        turns = [_answer_span(a, ids, tokenizer, encode)[0] for a in plan.answers]
        ends = [0, *(end for _, end in turns)]
        starts = [*(start for start, _ in turns), len(ids)]
        return whole, list(zip(ends, starts, strict=True)), True
    if plan.marked:
        spans = _to_tokens(plan.marked, whole.offsets)
        ends = tokenizer.turn_ids
        all_end = all(not ends.isdisjoint(ids[a:b]) for a, b in spans)
        return whole, spans, all_end
    found = [_answer_span(a, ids, tokenizer, encode) for a in plan.answers]
    return whole, [span for span, _ in found], all(has_end for _, has_end in found)


def _answer_span(
    answer: Answer,
    ids: list[int],
    tokenizer: Tokenizer,
    encode: Callable[[Rendered], Encoded],
) -> tuple[Span, bool]:
    """Returns the tokens of an answer, and whether a control token ends it."""
    pair = encode(answer.before), encode(answer.upto)
    first = min(part.shared for part in pair)
    before, upto = (ids[first : part.shared] + part.ids for part in pair)
    if upto[: len(before)] != before:
        raise RowError(
            f"message {answer.index}: the answer's first characters share a token "
            "with the turn's header (does it begin with white space?)"
        )
    end, has_end = _answer_end(upto, len(before), tokenizer)
    if ids[first : first + end] != upto[:end]:
        raise RowError(
            f"message {answer.index}: the answer's last characters share a token "
            "with the next turn"
        )
    return (first + len(before), first + end), has_end


def _answer_end(
    ids: Sequence[int], start: int, tokenizer: Tokenizer
) -> tuple[int, bool]:
    """Returns where an answer's tokens end: after its last turn marker, if it has one.

    Only white space may follow that token. Without one the whole turn is trained on,
    because then the line break after it is all that tells the model to stop.
    """
    for index in range(len(ids) - 1, start - 1, -1):
        if ids[index] in tokenizer.turn_ids:
            if tokenizer.decode(ids[index + 1 :]).strip():
                break
            return index + 1, True
    return len(ids), False


def _render_answer(
    index: int, upto: Rendered, render: Callable[..., Rendered]
) -> Answer | None:
    """Renders up to the start of an answer; None if the answer's text begins otherwise."""
    try:
        before = render(index, add_generation_prompt=True)
        if upto.text.startswith(before.text):
            return Answer(index, before, upto)
    except RowError:
        if index:
            raise
    if index == 0:
        raise RowError(
            "the conversation begins with an assistant turn, and the chat template "
            "does not show where its content starts"
        )
    return None


def _unstable_template(where: str, index: int) -> UnsupportedError:
    return UnsupportedError(
        f"{where}: the chat template changes earlier text when message {index} is "
        "added, so the answer's tokens cannot be distinguished from the rest; train on "
        "the last answer (data.train_on=last_assistant), or on each in a sample of its "
        "own (data.split_turns=true), or use a template with generation blocks "
        "({% generation %}...{% endgeneration %})"
    )


def _to_tokens(spans: Sequence[Span], offsets: Sequence[Span]) -> list[Span]:
    """Returns spans of the tokens that share a character with a span of characters."""
    starts = [start for start, _ in offsets]
    ends = [end for _, end in offsets]
    return [
        (bisect_right(ends, start), bisect_left(starts, end))
        for start, end in spans
        if start < end
    ]
