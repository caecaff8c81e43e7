"""The `quantization_config` of a config.json: how the weights of its files are stored.

Source: transformers `BitsAndBytesConfig` and `FineGrainedFP8Config`; compressed-tensors
`QuantizationConfig`.
"""

from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from jlora.errors import UnsupportedError, listing

_ORIGINAL = "use the original bfloat16, float16 or float32 model"


@dataclass(frozen=True)
class Quantization:
    """How the weights of most linear layers are stored; the others are plain."""

    method: Literal["bitsandbytes", "fp8"]
    """bitsandbytes: nf4 in blocks of 64; fp8: e4m3 with scales."""
    block: tuple[int, int] | None = None
    """fp8: rows and columns of HF's matrix [out, in] that share a scale. None: all of the
    matrix, or each row, which the shape of the scales says."""


def find_quantization(config: dict[str, Any]) -> Quantization | None:
    """Returns what a config.json says of quantised weights, or None.

    Raises:
        UnsupportedError: a method or a form of it that jlora does not read.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method is None and isinstance(settings, dict) and settings.get("load_in_4bit"):
        method = "bitsandbytes"  # as older versions of Transformers wrote it
    read = {
        "bitsandbytes": _bitsandbytes,
        "fp8": _fp8,
        "compressed-tensors": _compressed_tensors,
    }.get(method if isinstance(method, str) else "")
    if read is None:
        raise UnsupportedError(
            "config.json: the checkpoint is quantised "
            f"({method or 'unknown method'!s:.80}); {_ORIGINAL}"
        )
    return read(settings)


def _bitsandbytes(settings: dict[str, Any]) -> Quantization:
    kind = settings.get("bnb_4bit_quant_type", "fp4")  # its default
    if settings.get("load_in_8bit") or not settings.get("load_in_4bit"):
        kind = "llm_int8"
    if kind != "nf4":
        raise UnsupportedError(
            f"config.json: the checkpoint is quantised by bitsandbytes as {kind!s:.40}; "
            f"jlora reads its nf4; {_ORIGINAL}"
        )
    return Quantization("bitsandbytes")


def _fp8(settings: dict[str, Any]) -> Quantization:
    if settings.get("fmt", "e4m3") != "e4m3":
        _refuse("fp8", f"fmt={settings['fmt']!r:.40}")
    block = settings.get("weight_block_size")
    return Quantization("fp8", None if block is None else _block("fp8", block))


def _compressed_tensors(settings: dict[str, Any]) -> Quantization:
    name = "compressed-tensors"
    if settings.get("format") != "float-quantized":
        _refuse(name, f"format={settings.get('format')!r:.40}")
    for key in ("kv_cache_scheme", "transform_config"):
        if settings.get(key):
            _refuse(name, key)
    sparsity = settings.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format") not in (None, "dense"):
        _refuse(name, "sparsity_config")
    groups = settings.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    weights = [group.get("weights") for group in groups if isinstance(group, dict)]
    if len(weights) != 1 or not isinstance(weights[0], dict):
        _refuse(name, f"{len(weights)} config_groups")
    form = weights[0]
    expected = {"num_bits": 8, "type": "float", "symmetric": True}
    wrong = [
        f"{key}={form.get(key)!r:.40}"
        for key, value in expected.items()
        if form.get(key, value) != value
    ]
    strategy = form.get("strategy")
    if strategy not in ("tensor", "channel", "block"):
        wrong.append(f"strategy={strategy!r:.40}")
    if wrong:
        _refuse(name, listing(wrong))
    block = form.get("block_structure") if strategy == "block" else None
    return Quantization("fp8", None if block is None else _block(name, block))


def _block(name: str, block: Any) -> tuple[int, int]:
    if not (
        isinstance(block, list)
        and len(block) == 2
        and all(type(size) is int and 0 < size < 1 << 31 for size in block)
    ):
        _refuse(name, f"blocks of {block!r:.40}")
    return block[0], block[1]


def _refuse(method: str, what: str) -> NoReturn:
    raise UnsupportedError(
        f"config.json: the checkpoint is quantised by {method} with {what}, which jlora "
        f"does not read; {_ORIGINAL}"
    )
