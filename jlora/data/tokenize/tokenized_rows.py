"""Rows to token ids, and which of them the loss counts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jlora.data.chat.control_tokens import Encoded, Rendered, Span, check_text
from jlora.data.read.jsonl import Problem, RowError, parse_rows
from jlora.data.read.records import ChatRecord, Layout, TextRecord, make_record
from jlora.data.read.row_files import Chunk, place
from jlora.data.tokenize.assistant_masks import Plan, find_spans, plan_conversation
from jlora.data.tokenize.prefix_ids import encode_beginnings
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import UsageError, listing

_CHAT_CHOICES = ("assistant", "last_assistant", "completion", "all")
_CHOICES = {
    ("text", False): ("all",),
    ("prompt_completion", False): ("completion", "all"),
    ("prompt_completion", True): ("completion", "assistant", "last_assistant", "all"),
    ("messages", True): _CHAT_CHOICES,
    ("sharegpt", True): _CHAT_CHOICES,
    ("alpaca", True): _CHAT_CHOICES,
    # The only answer, whatever it is called.
    ("alpaca", False): ("completion", "assistant", "last_assistant", "all"),
}


@dataclass(frozen=True)
class Example:
    """Token ids int32 [n]; loss_mask uint8 [n] is 1 where the token is to be learnt."""

    path: Path
    number: int
    """Line or row of the file, from 1."""
    tokens: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True)
class Reading:
    """How the rows of a source become examples."""

    layout: Layout
    train_on: str
    """Never auto."""


@dataclass
class Tokenized:
    """Examples in file order, and what there is to say about the other rows."""

    examples: list[Example] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    encoded_apart: list[int] = field(default_factory=list)
    """Lines whose prompt and completion would have shared a token."""
    without_end: list[int] = field(default_factory=list)
    """Lines with an answer that no control token ends."""


def resolve_train_on(layout: Layout, train_on: str, where: str) -> str:
    """Returns what auto means here: the first choice that fits the format.

    Raises:
        UsageError: a choice that fits no column of the source.
    """
    choices = _CHOICES[layout.format, layout.is_chat]
    if train_on == "auto":
        return choices[0]
    if train_on not in choices:
        kind = " with strings" if layout.format == "prompt_completion" else ""
        raise UsageError(
            f"data.train_on={train_on} does not fit {where}, which is of format "
            f"{layout.format}{kind}; choose {listing(['auto', *choices])}"
        )
    return train_on


def tokenize(chunk: Chunk, reading: Reading, tokenizer: Tokenizer) -> Tokenized:
    """Returns one example per good row of a chunk; a pure function of its arguments.

    Raises:
        UsageError: conversations without a chat template, text without an EOS token.
        UnsupportedError: a template that does not show what the assistant said.
    """
    layout = reading.layout
    if layout.is_chat:
        tokenizer.template()  # one message now instead of one per record
    elif tokenizer.eos_id is None:
        raise UsageError(
            "the tokenizer has no EOS token, so the model would never learn to stop; "
            "set eos_token in tokenizer_config.json"
        )
    rows, problems = parse_rows(chunk)
    result = Tokenized(problems=problems)
    texts: list[TextRecord] = []
    chats: list[ChatRecord] = []
    for number, row in rows:
        try:
            record = make_record(number, row, layout)
        except RowError as error:
            result.problems.append(Problem(chunk.path, number, str(error)))
            continue
        if isinstance(record, TextRecord):
            texts.append(record)
        else:
            chats.append(record)
    if texts:
        _tokenize_texts(texts, chunk, reading, tokenizer, result)
    if chats:
        _tokenize_chats(chats, chunk, reading, tokenizer, result)
    result.problems.sort(key=lambda problem: problem.number)
    return result


def _example(
    path: Path, number: int, tokens: np.ndarray, spans: Iterable[Span]
) -> Example:
    loss_mask = np.zeros(len(tokens), np.uint8)
    for start, end in spans:
        loss_mask[start:end] = 1
    loss_mask[:1] = 0  # nothing comes before the first token to predict it from
    return Example(path, number, tokens, loss_mask)


def _tokenize_texts(
    records: Sequence[TextRecord],
    chunk: Chunk,
    reading: Reading,
    tokenizer: Tokenizer,
    result: Tokenized,
) -> None:
    usable = []
    for record in records:
        try:
            check_text(record.prompt)
            check_text(record.completion)
            usable.append(record)
        except RowError as error:
            result.problems.append(Problem(chunk.path, record.number, str(error)))
    wholes = tokenizer.encode_many([r.prompt + r.completion for r in usable])
    heads = tokenizer.encode_many([r.prompt for r in usable])
    for record, ids, head in zip(usable, wholes, heads, strict=True):
        if ids[: len(head)] != head:
            # At inference the prompt is encoded by itself, so that is what to train on.
            try:
                ids = head + tokenizer.encode_continuation(record.completion)
            except RowError as error:
                result.problems.append(Problem(chunk.path, record.number, str(error)))
                continue
            result.encoded_apart.append(record.number)
        tokens = tokenizer.with_bos(ids)
        if tokenizer.bos_id is not None and tokens[:2] == [tokenizer.bos_id] * 2:
            reason = "the text begins with the BOS token twice"
            result.problems.append(Problem(chunk.path, record.number, reason))
            continue
        start = len(head) + len(tokens) - len(ids)
        if tokens[-1:] != [tokenizer.eos_id]:
            tokens = [*tokens, tokenizer.eos_id]
        span = (0 if reading.train_on == "all" else start, len(tokens))
        array = np.array(tokens, np.int32)
        result.examples.append(_example(chunk.path, record.number, array, [span]))


def _tokenize_chats(
    records: Sequence[ChatRecord],
    chunk: Chunk,
    reading: Reading,
    tokenizer: Tokenizer,
    result: Tokenized,
) -> None:
    plans = []
    for record in records:
        where = place(chunk.path, record.number)
        try:
            plan = plan_conversation(
                record, tokenizer, train_on=reading.train_on, where=where
            )
            plans.append(plan)
        except RowError as error:
            result.problems.append(Problem(chunk.path, record.number, str(error)))
    encoded = _encode_all(plans, tokenizer)

    def lookup(rendered: Rendered) -> Encoded:
        if rendered.cuts:  # may be refused, so that its own record must answer for it
            return tokenizer.encode_rendered([rendered], with_offsets=True)[0]
        return encoded[rendered]

    for plan in plans:
        try:
            whole, spans, all_end = find_spans(plan, tokenizer, lookup)
        except RowError as error:
            result.problems.append(Problem(chunk.path, plan.number, str(error)))
            continue
        result.examples.append(_example(chunk.path, plan.number, whole.array, spans))
        if not all_end:
            result.without_end.append(plan.number)


def _encode_all(plans: Sequence[Plan], tokenizer: Tokenizer) -> dict[Rendered, Encoded]:
    """Encodes every text once; the last answer's end is the end of the whole."""
    plain = [plan.whole for plan in plans if not plan.whole.cuts]
    unique = {whole.text: whole for whole in plain}
    with_offsets = any(plan.marked for plan in plans)
    encoded = tokenizer.encode_rendered([*unique.values()], with_offsets=with_offsets)
    by_text = dict(zip(unique, encoded, strict=True))
    wholes = {whole: by_text[whole.text] for whole in plain}
    beginnings = {
        text: plan.whole
        for plan in plans
        for text in plan.texts()
        if not text.cuts and text not in wholes
    }
    return wholes | encode_beginnings(beginnings, wholes, tokenizer)
