"""Records to token ids, and which of them the loss counts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jlora.data.control import Encoded, Rendered, Span, check_text
from jlora.data.jsonl import Problem, RowError
from jlora.data.masks import Plan, find_spans, plan_conversation
from jlora.data.records import ChatRecord, Records, TextRecord
from jlora.data.tokenizer import Tokenizer
from jlora.errors import UsageError, listing

# Records are encoded together, which is fast; in chunks, which bounds the memory.
_CHUNK = 1024
_CHOICES = {
    ("text", False): ("all",),
    ("prompt_completion", False): ("completion", "all"),
    ("prompt_completion", True): ("completion", "assistant", "all"),
    ("messages", True): ("assistant", "completion", "all"),
}


@dataclass(frozen=True)
class Example:
    """Token ids int32 [n]; loss_mask uint8 [n] is 1 where the token is to be learnt."""

    line: int
    tokens: np.ndarray
    loss_mask: np.ndarray


@dataclass
class Tokenized:
    """Examples in file order, and what there is to say about the others."""

    examples: list[Example] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    encoded_apart: list[int] = field(default_factory=list)
    """Lines whose prompt and completion would have shared a token."""
    without_end: list[int] = field(default_factory=list)
    """Lines with an answer that no control token ends."""


def resolve_train_on(records: Records, train_on: str) -> str:
    """Returns what auto means here: the first choice that fits the format.

    Raises:
        UsageError: a choice that fits no column of the file.
    """
    choices = _CHOICES[records.format, records.is_chat]
    if train_on == "auto":
        return choices[0]
    if train_on not in choices:
        kind = " with strings" if records.format == "prompt_completion" else ""
        raise UsageError(
            f"data.train_on={train_on} does not fit {records.path}, which is of format "
            f"{records.format}{kind}; choose {listing(['auto', *choices])}"
        )
    return train_on


def tokenize(records: Records, tokenizer: Tokenizer, train_on: str) -> Tokenized:
    """Returns one example per record; `train_on` is a resolved choice.

    Raises:
        UsageError: conversations without a chat template, text without an EOS token.
        UnsupportedError: a template that does not show what the assistant said.
    """
    result = Tokenized()
    if not records.is_chat and tokenizer.eos_id is None:
        raise UsageError(
            "the tokenizer has no EOS token, so the model would never learn to stop; "
            "set eos_token in tokenizer_config.json"
        )
    for begin in range(0, len(records.good), _CHUNK):
        chunk = records.good[begin : begin + _CHUNK]
        texts = [record for record in chunk if isinstance(record, TextRecord)]
        chats = [record for record in chunk if isinstance(record, ChatRecord)]
        _tokenize_texts(texts, tokenizer, train_on, result)
        _tokenize_chats(chats, tokenizer, train_on, result, records.path)
    return result


def _example(line: int, ids: Sequence[int], spans: Iterable[Span]) -> Example:
    tokens = np.array(ids, np.int32)
    loss_mask = np.zeros(len(ids), np.uint8)
    for start, end in spans:
        loss_mask[start:end] = 1
    loss_mask[:1] = 0  # nothing comes before the first token to predict it from
    return Example(line, tokens, loss_mask)


def _tokenize_texts(
    records: Sequence[TextRecord],
    tokenizer: Tokenizer,
    train_on: str,
    result: Tokenized,
) -> None:
    usable = []
    for record in records:
        try:
            check_text(record.prompt)
            check_text(record.completion)
            usable.append(record)
        except RowError as error:
            result.problems.append(Problem(record.line, str(error)))
    wholes = tokenizer.encode_many([r.prompt + r.completion for r in usable])
    heads = tokenizer.encode_many([r.prompt for r in usable])
    for record, ids, head in zip(usable, wholes, heads, strict=True):
        if ids[: len(head)] != head:
            # At inference the prompt is encoded by itself, so that is what to train on.
            try:
                ids = head + tokenizer.encode_continuation(record.completion)
            except RowError as error:
                result.problems.append(Problem(record.line, str(error)))
                continue
            result.encoded_apart.append(record.line)
        tokens = tokenizer.with_bos(ids)
        start = len(head) + len(tokens) - len(ids)
        if tokens[-1:] != [tokenizer.eos_id]:
            tokens = [*tokens, tokenizer.eos_id]
        span = (0 if train_on == "all" else start, len(tokens))
        result.examples.append(_example(record.line, tokens, [span]))


def _tokenize_chats(
    records: Sequence[ChatRecord],
    tokenizer: Tokenizer,
    train_on: str,
    result: Tokenized,
    path: Path,
) -> None:
    plans = []
    for record in records:
        where = f"{path}, line {record.line}"
        try:
            plans.append(
                plan_conversation(record, tokenizer, train_on=train_on, where=where)
            )
        except RowError as error:
            result.problems.append(Problem(record.line, str(error)))
    encoded = _encode_all(plans, tokenizer)

    def lookup(rendered: Rendered) -> Encoded:
        if rendered.cuts:  # may be refused, so that its own record must answer for it
            return tokenizer.encode_rendered([rendered], with_offsets=True)[0]
        return encoded[rendered]

    for plan in plans:
        try:
            ids, spans, all_end = find_spans(plan, tokenizer, lookup)
        except RowError as error:
            result.problems.append(Problem(plan.line, str(error)))
            continue
        result.examples.append(_example(plan.line, ids, spans))
        if not all_end:
            result.without_end.append(plan.line)


def _encode_all(plans: Sequence[Plan], tokenizer: Tokenizer) -> dict[Rendered, Encoded]:
    """Encodes every text once; the last answer's end is the end of the whole."""
    texts = {text: None for plan in plans for text in plan.texts() if not text.cuts}
    unique = list(texts)
    with_offsets = any(plan.marked for plan in plans)
    encoded = tokenizer.encode_rendered(unique, with_offsets=with_offsets)
    return dict(zip(unique, encoded, strict=True))
