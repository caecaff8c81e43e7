"""Turns rows into examples: token ids, and a mask of the tokens that the loss counts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from jlora.data.chat.control_tokens import Encoded, Rendered, Span, check_text
from jlora.data.read.bad_rows import BadRow, RowError
from jlora.data.read.jsonl import parse_rows
from jlora.data.read.records import (
    ChatRecord,
    TextRecord,
    make_record,
    split_turns,
)
from jlora.data.read.row_files import RowChunk, row_location
from jlora.data.read.row_formats import RowFormat
from jlora.data.tokenize.assistant_masks import (
    MaskPlan,
    find_supervised_spans,
    plan_masks,
)
from jlora.data.tokenize.prefix_ids import encode_prefixes
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import UsageError


@dataclass(frozen=True)
class Example:
    """Token ids int32 [n]; loss_mask uint8 [n] is 1 where the loss counts the token."""

    path: Path
    number: int
    """Line or row of the file, from 1."""
    tokens: np.ndarray
    loss_mask: np.ndarray


@dataclass
class TokenizedRows:
    """The examples of a chunk, and what there is to report about its rows."""

    path: Path
    num_rows: int
    bad_rows: list[BadRow]
    examples: list[Example] = field(default_factory=list)
    encoded_separately: list[int] = field(default_factory=list)
    """Rows whose prompt and completion would have shared a token."""
    without_end: list[int] = field(default_factory=list)
    """Rows with an answer that no control token ends."""
    opened_thoughts: list[int] = field(default_factory=list)
    """Rows with an answer whose thought the template opens, and drops once it is written."""

    def add_bad(self, number: int, reason: object) -> None:
        """Adds a row that cannot be used."""
        self.bad_rows.append(BadRow(self.path, number, str(reason)))

    def add_example(
        self, number: int, tokens: np.ndarray, spans: Iterable[Span]
    ) -> None:
        """Adds an example whose tokens in `spans` the loss counts."""
        loss_mask = np.zeros(len(tokens), np.uint8)
        for start, end in spans:
            loss_mask[start:end] = 1
        loss_mask[:1] = 0  # nothing comes before the first token to predict it from
        self.examples.append(Example(self.path, number, tokens, loss_mask))


def tokenize_rows(
    chunk: RowChunk, row_format: RowFormat, tokenizer: Tokenizer
) -> TokenizedRows:
    """Returns one example per good row of a chunk; a pure function of its arguments.

    Raises:
        UsageError: conversations without a chat template, text without an EOS token.
        UnsupportedError: a template that does not show which text is the assistant's.
    """
    if row_format.is_chat:
        tokenizer.template()  # raises one error now instead of one per record
    elif tokenizer.eos_id is None:
        raise UsageError(
            "the tokenizer has no EOS token, so the model would never learn to stop; "
            "set eos_token in tokenizer_config.json"
        )
    rows, bad_rows = parse_rows(chunk)
    result = TokenizedRows(chunk.path, len(chunk.rows), bad_rows)
    texts: list[TextRecord] = []
    chats: list[ChatRecord] = []
    for number, row in rows:
        try:
            record = make_record(number, row, row_format)
        except RowError as error:
            result.add_bad(number, error)
            continue
        if isinstance(record, TextRecord):
            texts.append(record)
        elif row_format.split_turns:
            chats += split_turns(record) or [record]
        else:
            chats.append(record)
    if texts:
        _tokenize_texts(texts, row_format.train_on, tokenizer, result)
    if chats:
        train_on = "last_assistant" if row_format.split_turns else row_format.train_on
        _tokenize_chats(chats, train_on, tokenizer, result)
    result.bad_rows.sort(key=lambda row: row.number)
    return result


def _tokenize_texts(
    records: Sequence[TextRecord],
    train_on: str,
    tokenizer: Tokenizer,
    result: TokenizedRows,
) -> None:
    usable = []
    for record in records:
        try:
            check_text(record.prompt)
            check_text(record.completion)
            usable.append(record)
        except RowError as error:
            result.add_bad(record.number, error)
    wholes = tokenizer.encode_many([r.prompt + r.completion for r in usable])
    prompts = tokenizer.encode_many([r.prompt for r in usable])
    for record, ids, prompt in zip(usable, wholes, prompts, strict=True):
        if ids[: len(prompt)] != prompt:
            # The prompt will be encoded by itself at inference, so train on that.
            try:
                ids = prompt + tokenizer.encode_continuation(record.completion)
            except RowError as error:
                result.add_bad(record.number, error)
                continue
            result.encoded_separately.append(record.number)
        tokens = tokenizer.with_bos(ids)
        if tokenizer.begins_with_two_bos(tokens):
            result.add_bad(record.number, "the text begins with the BOS token twice")
            continue
        start = len(prompt) + len(tokens) - len(ids)
        if tokens[-1:] != [tokenizer.eos_id]:
            tokens = [*tokens, tokenizer.eos_id]
        span = (0 if train_on == "all" else start, len(tokens))
        result.add_example(record.number, np.array(tokens, np.int32), [span])


def _tokenize_chats(
    records: Sequence[ChatRecord],
    train_on: str,
    tokenizer: Tokenizer,
    result: TokenizedRows,
) -> None:
    plans = []
    where = partial(row_location, result.path)
    planned = plan_masks(records, tokenizer, train_on=train_on, where=where)
    for record, plan in zip(records, planned, strict=True):
        if isinstance(plan, RowError):
            result.add_bad(record.number, plan)
        else:
            plans.append(plan)
    encoded = _encode_all(plans, tokenizer)

    def encode(rendered: Rendered) -> Encoded:
        if rendered.boundaries:  # encoded here, so that an error is this record's own
            return tokenizer.encode_rendered([rendered], with_offsets=True)[0]
        return encoded[rendered]

    for plan in plans:
        try:
            whole, spans, all_end = find_supervised_spans(plan, tokenizer, encode)
        except RowError as error:
            result.add_bad(plan.number, error)
            continue
        result.add_example(plan.number, whole.array, spans)
        if not all_end:
            result.without_end.append(plan.number)
        if plan.opens_thought:
            result.opened_thoughts.append(plan.number)


def _encode_all(
    plans: Sequence[MaskPlan], tokenizer: Tokenizer
) -> dict[Rendered, Encoded]:
    """Encodes the texts of all plans that hold no control strings, each text once."""
    plain = [plan.whole for plan in plans if not plan.whole.boundaries]
    unique = {whole.text: whole for whole in plain}
    with_offsets = any(plan.marked for plan in plans)
    encoded = tokenizer.encode_rendered([*unique.values()], with_offsets=with_offsets)
    by_text = dict(zip(unique, encoded, strict=True))
    wholes = {whole: by_text[whole.text] for whole in plain}
    prefixes = {
        text: plan.whole
        for plan in plans
        for text in plan.texts()
        if not text.boundaries and text not in wholes
    }
    return wholes | encode_prefixes(prefixes, wholes, tokenizer)
