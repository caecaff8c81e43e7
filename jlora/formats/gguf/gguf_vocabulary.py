"""A model's tokenizer as the metadata of a GGUF file: the inverse of `gguf_tokenizer`.

llama.cpp reads the tokens, their types and merges; `tokenizer.huggingface.json` holds the
whole tokenizer.json besides, for programs that use it as it is.

Source: llama.cpp, convert_hf_to_gguf.py, gguf-py/gguf/vocab.py and src/llama-vocab.cpp.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from jlora.config.llama_config import LlamaConfig
from jlora.config.strict_json import parse_json_object
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import CorruptError, UnsupportedError, UsageError, listing
from jlora.formats.gguf.gguf_tokenizer import (
    BYTE,
    CONTROL,
    LLAMA3_NAMES,
    NORMAL,
    PRE_TOKENIZERS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    make_pre_tokenizer,
)

_MAX_BYTES = 64 << 20
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"


def vocabulary_metadata(
    files: Mapping[str, bytes], tokenizer: Tokenizer, config: LlamaConfig
) -> dict[str, Any]:
    """Returns {key: value} of the tokenizer, its special tokens and its template.

    Args:
        files: of the model.
        tokenizer: made from them.
        config: of the model that is written, which may have more tokens.

    Raises:
        UnsupportedError: a tokenizer that llama.cpp would not compute the same.
        CorruptError: it has more tokens than the model.
    """
    document = parse_json_object(files["tokenizer.json"], "tokenizer.json", _MAX_BYTES)
    found = {
        **_model(document, config.vocab_size),
        **_tokens(document, tokenizer, config),
    }
    stops = sorted(tokenizer.stop_ids - {tokenizer.eos_id})
    eom = [i for i in stops if "eom" in tokenizer.token(i)]
    ids = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "padding": tokenizer.pad_id,
        "eot": next((i for i in stops if i not in eom), None),
        "eom": eom[0] if eom else None,
    }
    template = default_template(tokenizer)
    return found | {
        **{f"tokenizer.ggml.{k}_token_id": i for k, i in ids.items() if i is not None},
        "tokenizer.ggml.add_bos_token": tokenizer.adds_bos,
        **({} if template is None else {"tokenizer.chat_template": template}),
        "tokenizer.huggingface.json": files["tokenizer.json"].decode(),
    }


def default_template(tokenizer: Tokenizer) -> str | None:
    """Returns the text of the chat template, None if there is none without a name."""
    try:
        return tokenizer.template().source
    except UsageError:
        return None


def _model(document: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Returns which tokenizer of llama.cpp it is, with its merges."""
    model = document["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", ())]
    if model.get("byte_fallback"):
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.add_space_prefix": _adds_space(document),
            "tokenizer.ggml.scores": _scores(model["vocab"], merges, size),
        }
    pre = _pre_tokenizer_name(document)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.merges": merges,
    }


def _pre_tokenizer_name(document: Mapping[str, Any]) -> str:
    """Returns llama.cpp's name of what cuts a text before it is merged."""
    for name in PRE_TOKENIZERS:
        known = json.loads(make_pre_tokenizer(name).__getstate__())
        whole = bool(document["model"].get("ignore_merges"))
        if (
            _without_offsets(known) == _without_offsets(document.get("pre_tokenizer"))
            and document.get("normalizer") is None
            and whole == (name in LLAMA3_NAMES)
        ):
            return name
    raise UnsupportedError(
        "tokenizer.json: llama.cpp has no name that jlora knows for its normalizer and "
        f"pre_tokenizer (known: {listing(PRE_TOKENIZERS)}, and SentencePiece); export a "
        "Hugging Face folder (--to hf) and convert it with llama.cpp's "
        "convert_hf_to_gguf.py"
    )


def _without_offsets(value: Any) -> Any:
    """Returns a part of tokenizer.json without what changes no id."""
    if isinstance(value, list):
        return [_without_offsets(item) for item in value]
    if isinstance(value, dict):
        return {k: _without_offsets(v) for k, v in value.items() if k != "trim_offsets"}
    return value


def _adds_space(document: Mapping[str, Any]) -> bool:
    """Returns whether a SentencePiece tokenizer puts a space before a text.

    Raises:
        UnsupportedError: it changes the text in another way, too.
    """
    adds_space = replaces = False
    parts = [document.get("normalizer"), document.get("pre_tokenizer")]
    queue = [part for part in parts if part is not None]
    while queue:
        part = queue.pop()
        match part:
            case {"type": "Sequence"}:
                queue += part.get("normalizers", part.get("pretokenizers", []))
            case {"type": "Prepend", "prepend": "\u2581"}:
                adds_space = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                replaces = True
            case {"type": "Metaspace", "replacement": "\u2581"}:
                replaces = True
                scheme = part.get("prepend_scheme", "always")
                adds_space |= scheme != "never" and part.get("add_prefix_space", True)
            case _:
                raise UnsupportedError(
                    f"tokenizer.json: {part.get('type')} is not what llama.cpp's "
                    "SentencePiece does; export a Hugging Face folder (--to hf)"
                )
    if not replaces:
        raise UnsupportedError(
            f"tokenizer.json: byte_fallback without {_SPACE} for spaces is not what "
            "llama.cpp's SentencePiece does; export a Hugging Face folder (--to hf)"
        )
    return adds_space


def _scores(vocab: Mapping[str, int], merges: list[str], size: int) -> list[float]:
    """Returns every token's score: of two that can be merged, the earlier has the higher."""
    scores: dict[int | None, float] = {}
    for rank, merge in enumerate(merges):
        scores.setdefault(vocab.get(merge.replace(" ", "")), float(-rank))
    return [scores.get(index, float(-len(merges))) for index in range(size)]


def _tokens(
    document: Mapping[str, Any], tokenizer: Tokenizer, config: LlamaConfig
) -> dict[str, Any]:
    """Returns every token's text and type."""
    model = document["model"]
    tokens = {index: (text, NORMAL) for text, index in model["vocab"].items()}
    for index, (text, _) in tokens.items():
        if model.get("byte_fallback") and _BYTE_TOKEN.fullmatch(text):
            tokens[index] = text, BYTE
    for token in document.get("added_tokens", ()):
        kind = CONTROL if token.get("special") else USER_DEFINED
        tokens[token["id"]] = token["content"], kind
    unknown = model["vocab"].get(model.get("unk_token"))
    if unknown is not None:
        tokens[unknown] = tokens[unknown][0], UNKNOWN
    size = config.vocab_size
    for index in range(size):
        if index not in tokens:  # tokenizer_config.json may add some
            known = tokenizer.is_added(index)
            text = tokenizer.token(index) if known else f"[PAD{index}]"
            tokens[index] = text, CONTROL if known else UNUSED
    if len(tokens) > size:
        raise CorruptError(
            f"tokenizer.json has ids up to {max(tokens)}, the model has {size} tokens"
        )
    texts, kinds = zip(*(tokens[index] for index in range(size)), strict=True)
    found: dict[str, Any] = {
        "tokenizer.ggml.tokens": list(texts),
        "tokenizer.ggml.token_type": list(kinds),
    }
    if unknown is not None:
        found["tokenizer.ggml.unknown_token_id"] = unknown
    return found
