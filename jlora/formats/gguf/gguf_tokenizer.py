"""Converts the tokenizer of a GGUF file to the files of Hugging Face, exactly or not at all.

Source: llama.cpp, convert_hf_to_gguf.py and src/llama-vocab.cpp.
"""

import json
from typing import Any

from jlora.errors import CorruptError, UnsupportedError, listing
from jlora.formats.gguf.gguf_file import GGUFFile
from jlora.formats.model_files import reading

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens."""
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
# dbrx cuts a text as Llama 3 does, but merges every word.
PRE_TOKENIZERS = ("smollm", "gpt-2", "dbrx", *LLAMA3_NAMES)
"""llama.cpp's names of the pre-tokenizers that can be rebuilt."""
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_files(file: GGUFFile) -> dict[str, bytes]:
    """Returns tokenizer.json, tokenizer_config.json and generation_config.json."""
    get = file.metadata.get
    tokens = get("tokenizer.ggml.tokens") or []
    ids = {
        kind: _token_id(file, kind, len(tokens))
        for kind in ("bos", "eos", "unknown", "padding", "eot", "eom")
    }
    add_bos = get("tokenizer.ggml.add_bos_token")
    if add_bos is None:  # llama.cpp's defaults
        add_bos = (
            get("tokenizer.ggml.pre") in LLAMA3_NAMES
            or get("tokenizer.ggml.model") == "llama"
        )
    names = {kind: None if i is None else tokens[i] for kind, i in ids.items()}
    tokenizer_config = {
        "add_bos_token": bool(add_bos),
        "bos_token": names["bos"],
        "chat_template": get("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "eos_token": names["eos"],
        "model_max_length": get("llama.context_length"),
        "pad_token": names["padding"],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": names["unknown"],
    }
    stops = sorted({i for i in (ids["eos"], ids["eot"], ids["eom"]) if i is not None})
    generation_config = {
        "bos_token_id": ids["bos"],
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": ids["padding"],
    }
    beside = file.path.parent / "tokenizer.json"
    if beside.is_file():
        with reading(beside):
            tokenizer = beside.read_bytes()
    elif get("tokenizer.huggingface.json"):
        tokenizer = get("tokenizer.huggingface.json", "").encode()
    else:
        tokenizer = _build_tokenizer(file, tokens, names["bos"] if add_bos else None)
    return {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": _json_bytes(tokenizer_config),
        "generation_config.json": _json_bytes(generation_config),
    }


def _json_bytes(document: dict[str, Any]) -> bytes:
    present = {key: value for key, value in document.items() if value is not None}
    return (json.dumps(present, indent=2, ensure_ascii=False) + "\n").encode()


def _token_id(file: GGUFFile, kind: str, num_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{kind}_token_id"
    value = file.metadata.get(key)
    if value is not None and not (isinstance(value, int) and value < num_tokens):
        raise CorruptError(f"{file.path}: {key}={value!r}, with {num_tokens} tokens")
    return value


def _build_tokenizer(file: GGUFFile, tokens: list[str], bos: str | None) -> bytes:
    """Returns a tokenizer.json that encodes as the one that the file was made from."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    get = file.metadata.get
    model, pre = get("tokenizer.ggml.model"), get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UnsupportedError(
            f"{file.path}: tokenizer.ggml.model={model!r}, tokenizer.ggml.pre={pre!r} "
            "cannot be rebuilt exactly (known: model 'gpt2' with pre "
            f"{listing(PRE_TOKENIZERS)}); put the model's tokenizer.json beside the file"
        )
    types = get("tokenizer.ggml.token_type") or [1] * len(tokens)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in get("tokenizer.ggml.merges") or []]
    if len(vocabulary) != len(tokens) or len(types) != len(tokens):
        raise CorruptError(
            f"{file.path}: tokenizer.ggml.tokens has {len(tokens)} entries, "
            f"{len(vocabulary)} of them different, and {len(types)} types"
        )
    try:
        tokenizer = Tokenizer(
            models.BPE(
                vocab=vocabulary, merges=merges, ignore_merges=pre in LLAMA3_NAMES
            )
        )
    except Exception as error:  # tokenizers raises nothing more precise
        raise CorruptError(f"{file.path}: tokenizer.ggml.merges: {error}") from error
    tokenizer.pre_tokenizer = make_pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"],
            pair=[bos, "$A", f"{bos}:1", "$B:1"],
            special_tokens=[(bos, vocabulary[bos])],
        )
    return tokenizer.to_str().encode()


def make_pre_tokenizer(pre: str) -> Any:
    """Returns the pre-tokenizer that llama.cpp calls `pre`."""
    from tokenizers import Regex, pre_tokenizers

    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "gpt-2":
        return gpt2
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, gpt2])
    split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated")
    return pre_tokenizers.Sequence([split, whole])
