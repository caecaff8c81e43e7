"""Quantised checkpoints as others publish them, written and dequantised by NumPy.

bitsandbytes 4-bit: `Params4bit` as Transformers saves it. fp8: DeepSeek's blocks, and
compressed-tensors' rows and tensors.
"""

import json
import math
from typing import Any

import ml_dtypes
import numpy as np

from helpers.tiny import CONFIG, tensors

# Multiples of 64, as in all real models.
QUANTIZED_CONFIG = CONFIG | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "torch_dtype": "bfloat16",
}
BNB = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
# The sixteen values, from the QLoRA paper's appendix.
TABLE = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
        *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ],
    np.float32,
)


def compressed(strategy: str, **weights: Any) -> dict[str, Any]:
    """The configuration of compressed-tensors."""
    form = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": form | weights}
        },
        "ignore": ["lm_head"],
    }


def code_book() -> np.ndarray:
    """256 values between -1 and 1, finer near 0, for the absmax of absmax."""
    steps = np.concatenate([10.0**-e * np.linspace(0.1, 1, 16) for e in range(8)])
    values = np.concatenate([-steps, steps])
    return np.sort(values[:256]).astype(np.float32)


def write_nf4(key: str, weight: np.ndarray, *, nested: bool) -> dict[str, np.ndarray]:
    """The tensors of one weight [out, in]."""
    blocks = weight.astype(np.float32).reshape(-1, 64)
    absmax = np.abs(blocks).max(axis=1)
    scaled = blocks / np.maximum(absmax, np.float32(1e-30))[:, None]
    codes = np.abs(scaled[..., None] - TABLE).argmin(axis=-1).astype(np.uint8).ravel()
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": list(weight.shape),
    }
    parts = {
        "": (codes[::2] << 4 | codes[1::2])[:, None],
        ".absmax": absmax,
        ".quant_map": TABLE,
    }
    if nested:
        book, offset = code_book(), float(absmax.mean())
        rest = absmax - np.float32(offset)
        groups = np.pad(rest, (0, -len(rest) % 256)).reshape(-1, 256)
        largest = np.abs(groups).max(axis=1)
        of_block = np.repeat(largest, 256)[: len(rest)]
        near = np.abs(rest[:, None] / of_block[:, None] - book).argmin(axis=1)
        parts[".absmax"] = near.astype(np.uint8)
        parts |= {".nested_absmax": largest, ".nested_quant_map": book}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32"}
        state["nested_offset"] = offset
    data = np.frombuffer(json.dumps(state).encode(), np.uint8)
    parts[".quant_state.bitsandbytes__nf4"] = data
    return {key + part: array for part, array in parts.items()}


def absmax_of(arrays: dict[str, np.ndarray], key: str) -> np.ndarray:
    """The absmax of a weight in float32, one for each block."""
    absmax = arrays[f"{key}.absmax"]
    if f"{key}.nested_absmax" not in arrays:
        return absmax
    state = json.loads(arrays[f"{key}.quant_state.bitsandbytes__nf4"].tobytes())
    result = np.empty(len(absmax), np.float32)
    for i, code in enumerate(absmax):
        largest = arrays[f"{key}.nested_absmax"][i // state["nested_blocksize"]]
        result[i] = arrays[f"{key}.nested_quant_map"][code] * largest
    return result + np.float32(state["nested_offset"])


def codes_of(arrays: dict[str, np.ndarray], key: str) -> np.ndarray:
    """The codes of a weight, one after the other."""
    packed = arrays[key].view(np.uint8).ravel()
    return np.stack([packed // 16, packed % 16], axis=1).ravel()


def dequantized_nf4(arrays: dict[str, np.ndarray], key: str) -> np.ndarray:
    """The weight [out, in] that the tensors stand for, in float32."""
    state = json.loads(arrays[f"{key}.quant_state.bitsandbytes__nf4"].tobytes())
    values = TABLE[codes_of(arrays, key)].reshape(-1, 64)
    return (values * absmax_of(arrays, key)[:, None]).reshape(state["shape"])


def write_fp8(
    key: str, weight: np.ndarray, block: tuple[int, int], name: str
) -> dict[str, np.ndarray]:
    """The tensors of one weight [out, in], whose blocks have a scale each."""
    rows, columns = weight.shape
    scales = np.empty((math.ceil(rows / block[0]), math.ceil(columns / block[1])), "f4")
    codes = np.empty(weight.shape, E4M3)
    for i, j in np.ndindex(*scales.shape):
        part = np.s_[
            i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]
        ]
        scales[i, j] = np.abs(weight[part]).max() / 448
        codes[part] = (weight[part] / scales[i, j]).astype(E4M3)
    return {key: codes, key.removesuffix("weight") + name: scales}


def dequantized_fp8(
    codes: np.ndarray, scales: np.ndarray, block: tuple[int, int]
) -> np.ndarray:
    """The weight [out, in] that they stand for, in float32."""
    wide = codes.astype(np.float32)
    for i, j in np.ndindex(*scales.shape):
        wide[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]] *= (
            scales[i, j]
        )
    return wide


def is_linear(key: str) -> bool:
    """Whether a key is of one of the seven projections."""
    return "_proj.weight" in key


def bnb_model(
    *, nested: bool = True, plain: tuple[str, ...] = (), config: Any = QUANTIZED_CONFIG
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json and tensors of a model; `plain` are parts of names that stay bfloat16."""
    arrays: dict[str, np.ndarray] = {}
    for key, array in tensors(config).items():
        weight = (array * 0.1).astype(ml_dtypes.bfloat16)
        if is_linear(key) and not any(part in key for part in plain):
            arrays |= write_nf4(key, weight, nested=nested)
        else:
            arrays[key] = weight
    settings = BNB | {"bnb_4bit_use_double_quant": nested}
    skipped = {"llm_int8_skip_modules": ["lm_head", *plain]}
    return config | {"quantization_config": settings | skipped}, arrays


def plain_model(
    config: dict[str, Any], arrays: dict[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The same model with its weights dequantised to float32."""
    keys = [key for key in arrays if f"{key}.quant_map" in arrays]
    parts = {name for name in arrays for key in keys if name.startswith(f"{key}")}
    plain = {key: array for key, array in arrays.items() if key not in parts}
    plain |= {key: dequantized_nf4(arrays, key) for key in keys}
    config = {k: v for k, v in config.items() if k != "quantization_config"}
    return config, {key: array.astype(np.float32) for key, array in plain.items()}


def fp8_model(
    block: tuple[int, int],
    name: str = "weight_scale_inv",
    settings: Any = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json and tensors of a model; without settings it has blocks of this size."""
    arrays: dict[str, np.ndarray] = {}
    for key, array in tensors(QUANTIZED_CONFIG).items():
        if is_linear(key):
            arrays |= write_fp8(key, array * np.float32(0.1), block, name)
        else:
            arrays[key] = array.astype(ml_dtypes.bfloat16)
    settings = settings or FP8 | {"weight_block_size": list(block)}
    return QUANTIZED_CONFIG | {"quantization_config": settings}, arrays
