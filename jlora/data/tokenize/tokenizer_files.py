"""What a model folder's files say about special tokens and templates."""

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
    "chat_template.jinja",
    "chat_template.json",
)
_ADDITIONAL = re.compile(r"additional_chat_templates/([^/]+)\.jinja")
_SPECIAL_NAMES = (
    *("bos_token", "eos_token", "unk_token", "sep_token"),
    *("pad_token", "cls_token", "mask_token"),
)


def read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Returns the object in a file, {} if there is no such file."""
    return (
        parse_json_object(files[name], name, _MAX_CONFIG_BYTES) if name in files else {}
    )


def special_tokens(
    sources: Sequence[Mapping[str, Any]],
    backend: tokenizers.Tokenizer,
    config: LlamaConfig,
) -> dict[str, str]:
    """Returns name -> text of the special tokens that the model has.

    The first source that names a token decides (null: none); config.json comes last.
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
            # Llama 1 says pad_token_id = -1 for none.
            value = None if index is None or index < 0 else backend.id_to_token(index)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            result[name] = value
        elif value is not None:
            raise CorruptError(f"tokenizer_config.json: {name} is {value!r}")
    return result


def templates(
    files: Mapping[str, bytes], settings: Mapping[str, Any]
) -> dict[str, str]:
    """Returns the templates by name; the first place that has any decides.

    additional_chat_templates/NAME.jinja belong to chat_template.jinja.
    """
    found_files = {
        _ADDITIONAL.sub(r"\1", name): name
        for name in sorted(files)
        if name == "chat_template.jinja" or _ADDITIONAL.fullmatch(name)
    }
    if found_files:
        default = found_files.pop("chat_template.jinja", None)
        names = {**found_files, **({"default": default} if default else {})}
        return {name: _text(files, file) for name, file in names.items()}
    found = settings.get("chat_template")
    if found is None:
        found = read_json(files, "chat_template.json").get("chat_template")
    if found is None:
        return {}
    if isinstance(found, str):
        return {"default": found}
    try:
        named = {str(entry["name"]): entry["template"] for entry in found}
    except (TypeError, KeyError) as error:
        raise CorruptError(
            "tokenizer_config.json: chat_template is neither a string nor a list of "
            "{name, template}"
        ) from error
    return named


def _text(files: Mapping[str, bytes], name: str) -> str:
    try:
        return files[name].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorruptError(f"{name}: not UTF-8 ({error})") from error


def eos_ids(value: object) -> frozenset[int]:
    """Returns the ids in an eos_token_id: null, one or a list."""
    items = value if isinstance(value, list) else [value]
    return frozenset(item for item in items if type(item) is int)


def fingerprint(files: Mapping[str, bytes]) -> str:
    """Returns a sha256 over what decides how text becomes ids, the pinned date included."""
    digest = hashlib.sha256(PINNED_DATE.date().isoformat().encode())
    for name in sorted(files):
        if name in _FINGERPRINTED or _ADDITIONAL.fullmatch(name):
            digest.update(f"{name} {len(files[name])}\n".encode())
            digest.update(files[name])
    return digest.hexdigest()
