"""What the files of a model folder say about special tokens and chat templates."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from jlora.config.llama_config import LlamaConfig
from jlora.config.strict_json import parse_json_object
from jlora.data.chat.jinja_sandbox import PINNED_DATE
from jlora.errors import CorruptError

_MAX_CONFIG_BYTES = 64 << 20
_FINGERPRINTED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_ADDITIONAL = re.compile(r"additional_chat_templates/([^/]+)\.jinja")
_SPECIAL_NAMES = (
    *("bos_token", "eos_token", "unk_token", "sep_token"),
    *("pad_token", "cls_token", "mask_token"),
)


def read_settings(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Returns the JSON object in a file, {} if there is no such file."""
    data = files.get(name, b"{}")
    return parse_json_object(data, name, _MAX_CONFIG_BYTES)


def find_special_tokens(
    sources: Sequence[Mapping[str, Any]],
    backend: tokenizers.Tokenizer,
    config: LlamaConfig,
) -> dict[str, str]:
    """Returns {name: text} of the special tokens that the model has.

    The first source that has the name decides (null: no such token); config.json comes
    last.
    """
    fallback = {
        "bos_token": config.bos_token_id,
        "eos_token": config.eos_token_id[0] if config.eos_token_id else None,
        "pad_token": config.pad_token_id,
    }
    result = {}
    for name in _SPECIAL_NAMES:
        value = next((source[name] for source in sources if name in source), ...)
        if value is ...:
            index = fallback.get(name)
            # Llama 1 writes pad_token_id = -1 for none.
            value = None if index is None or index < 0 else backend.id_to_token(index)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            result[name] = value
        elif value is not None:
            raise CorruptError(f"tokenizer_config.json: {name} is {value!r}")
    return result


def find_additional_tokens(
    settings: Mapping[str, Any], special_map: Mapping[str, Any]
) -> list[str]:
    """Returns the texts of the special tokens that have no name."""
    names = ("additional_special_tokens", "extra_special_tokens")
    values = [settings.get(name) for name in names]
    if "added_tokens_decoder" not in settings:
        values.append(special_map.get(names[0]))
    texts: list[Any] = [
        entry.get("content") if isinstance(entry, dict) else entry
        for entries in values
        if isinstance(entries, list)
        for entry in entries
    ]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise CorruptError(
            f"tokenizer_config.json: additional_special_tokens holds {wrong[0]!r}"
        )
    return texts


def find_templates(
    files: Mapping[str, bytes], settings: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
    """Returns {name: (file, chat template)} of the first place that has any.

    These are chat_template.jinja with additional_chat_templates/NAME.jinja, then
    tokenizer_config.json (`settings`), then chat_template.json.
    """
    templates = {}
    for file in sorted(files):
        additional = _ADDITIONAL.fullmatch(file)
        if additional or file == "chat_template.jinja":
            name = additional[1] if additional else "default"
            try:
                templates[name] = file, files[file].decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise CorruptError(f"{file}: not UTF-8 ({error})") from error
    if templates:
        return templates
    file, found = "tokenizer_config.json", settings.get("chat_template")
    if found is None:
        file = "chat_template.json"
        found = read_settings(files, file).get("chat_template")
    if found is None:
        return {}
    try:
        entries = (
            [("default", found)]
            if isinstance(found, str)
            else [(str(entry["name"]), str(entry["template"])) for entry in found]
        )
    except (TypeError, KeyError) as error:
        raise CorruptError(
            f"{file}: chat_template is neither a string nor a list of {{name, template}}"
        ) from error
    return {name: (file, template) for name, template in entries}


def eos_ids(value: object) -> frozenset[int]:
    """Returns the ids in an eos_token_id, which is null, a number or a list."""
    items = value if isinstance(value, list) else [value]
    return frozenset(item for item in items if type(item) is int)


def tokenizer_fingerprint(files: Mapping[str, bytes]) -> str:
    """Returns a sha256 of all that decides how text becomes ids, with the pinned date."""
    digest = hashlib.sha256(PINNED_DATE.date().isoformat().encode())
    for name in sorted(files):
        if name in _FINGERPRINTED or _ADDITIONAL.fullmatch(name):
            digest.update(f"{name} {len(files[name])}\n".encode())
            digest.update(files[name])
    return digest.hexdigest()
