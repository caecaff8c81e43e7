"""Writes GGUF files of a tiny model."""

import ml_dtypes
import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

TOKENS = ["<s>", "</s>", "<tool>", "h", "e", "l", "o", "Ġ", "1", "2", "he", "ll", "Ċ"]
TOKENS += [chr(ord("A") + i) for i in range(7)]
MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(key):
    if not key.startswith("model.layers."):
        return (
            key.replace("model.embed_tokens", "token_embd")
            .replace("model.norm", "output_norm")
            .replace("lm_head", "output")
        )
    _, _, layer, rest = key.split(".", 3)
    module, suffix = rest.rsplit(".", 1)
    return f"blk.{layer}.{MODULES[module]}.{suffix}"


def permute(array, heads):
    # As llama.cpp's converter: rows (head, half, pair) become (head, pair, half).
    pairs = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


METADATA = {
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 16,
    "llama.feed_forward_length": 24,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": 4,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 4] + [1] * (len(TOKENS) - 3),
    "tokenizer.ggml.merges": ["h e", "l l"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.chat_template": "{{ messages }}",
}


def add(writer, key, value):
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def write_gguf(
    path, arrays, changes=None, architecture="llama", kind=None, heads=(4, 2)
):
    """Writes HF tensors as llama.cpp's converter does; kind quantises the matrices."""
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in (METADATA | (changes or {})).items():
        if value is not None:
            add(writer, key, value)
    for key, value in arrays.items():
        if isinstance(value, tuple):  # rows of blocks and their format
            writer.add_tensor(gguf_name(key), value[0], raw_dtype=value[1])
            continue
        module = key.split(".")[-2]
        count = dict(zip(("q_proj", "k_proj"), heads, strict=True)).get(module)
        array = permute(value, count) if count else value
        name = (
            gguf_name(key) if "." in key and key.startswith(("model", "lm_")) else key
        )
        if array.dtype == ml_dtypes.bfloat16:
            writer.add_tensor(
                name, array.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16
            )
        elif kind is not None and array.ndim == 2:
            data = gguf.quants.quantize(array, kind)
            writer.add_tensor(name, data, raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def llama3_divisors(theta, head_dim, factor, original=8192):
    # Source: llama.cpp, convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors.
    result = []
    for frequency in theta ** (-np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * np.pi / frequency
        if wavelength < original / 4:
            result.append(1.0)
        elif wavelength > original:
            result.append(factor)
        else:
            smooth = (original / wavelength - 1) / (4 - 1)
            result.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(result, np.float32)
