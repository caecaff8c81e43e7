"""Files of prompts and conversations, and the same records with answers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jlora.config.strict_json import parse_json
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import CorruptError, UsageError

_MAX_BYTES = 64 << 20
Record = dict[str, Any]


def read_prompts(path: str) -> list[Record]:
    """Returns the records of a JSONL file, each with a `prompt` or `messages`.

    Raises:
        UsageError: there is no such file.
        CorruptError: a line is something else; it is named.
    """
    records: list[Record] = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if line.strip():
            where = f"{path}, line {number}"
            records.append(_checked(parse_json(line, where, _MAX_BYTES), where))
    if not records:
        raise UsageError(f"{path}: holds no prompts")
    return records


def read_messages(path: str) -> list[Record]:
    """Returns the conversation in a JSON file: a list of messages, or a record with one."""
    document = parse_json(_read(path), path, _MAX_BYTES)
    record = {"messages": document} if isinstance(document, list) else document
    record = _checked(record, path)
    if "messages" not in record:
        raise CorruptError(f"{path}: expected a list of messages")
    return record["messages"]


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error


def _checked(record: Any, where: str) -> Record:
    prompt = record.get("prompt") if isinstance(record, dict) else None
    messages = record.get("messages") if isinstance(record, dict) else None
    if isinstance(prompt, str) and messages is None:
        return record
    talk = messages if prompt is None and isinstance(messages, list) else []
    if not talk or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in talk
    ):
        raise CorruptError(
            f'{where}: expected {{"prompt": "..."}} or {{"messages": [{{"role": "user", '
            '"content": "..."}]}'
        )
    return record


def prompt_ids(record: Record, tokenizer: Tokenizer, *, chat: bool) -> list[int]:
    """Returns the ids to continue: of a text, or of a conversation up to the answer.

    Args:
        record: as `read_prompts` returns it.
        tokenizer: of the model.
        chat: whether a prompt is a message to answer, too.
    """
    if "messages" not in record and not chat:
        return tokenizer.encode(record["prompt"], add_bos=True)
    return conversation_ids(conversation(record), tokenizer, record.get("tools"))


def conversation_ids(
    messages: list[Record], tokenizer: Tokenizer, tools: list[Any] | None = None
) -> list[int]:
    """Returns the ids of a conversation, up to where its answer begins.

    Raises:
        CorruptError: a role is unknown, or the template refuses the conversation.
        UsageError: the model has no template.
    """
    tokenizer.template(tools).check_roles(messages)
    return tokenizer.encode_chat(messages, tools, add_generation_prompt=True)


def conversation(record: Record) -> list[Record]:
    """Returns the messages of a record; a prompt is the user's."""
    if "messages" in record:
        return list(record["messages"])
    return [{"role": "user", "content": record["prompt"]}]


def answered(record: Record, text: str, *, chat: bool) -> str:
    """Returns the record with its answer, as a line of JSON that training reads."""
    if "messages" in record or chat:
        messages = [*conversation(record), {"role": "assistant", "content": text}]
        more = {key: value for key, value in record.items() if key != "prompt"}
        record = {**more, "messages": messages}
    else:
        record = {**record, "completion": text}
    return json.dumps(record, ensure_ascii=False)


def with_system(messages: list[Record], system: str | None) -> list[Record]:
    """Returns a conversation that begins with this system message, if there is one."""
    if system is None:
        return messages
    rest = (
        messages[1:] if messages[:1] and messages[0]["role"] == "system" else messages
    )
    return [{"role": "system", "content": system}, *rest]


def batches(lengths: list[int], size: int) -> Iterator[list[int]]:
    """Yields indices of prompts to generate together: of similar length, at most `size`."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for begin in range(0, len(order), size):
        yield order[begin : begin + size]
