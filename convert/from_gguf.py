"""GGUF files as a `Source`: names, rotary layout, block formats and configuration.

llama.cpp's converter interleaves the rotary pairs of q and k; here the rows are put back
in HF's order. Quantised blocks become float32, one tensor at a time.

Source: llama.cpp, convert_hf_to_gguf.py and src/llama-model.cpp; gguf.constants.
"""

import itertools
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from convert.blocks import Index
from convert.gguf_file import GGUFFile, Tensor, read_gguf
from convert.gguf_tokenizer import tokenizer_files
from convert.names import Name, all_names
from convert.safetensors import Spec, read_bytes
from convert.source import Source, check_names, check_values, parse_config
from jlora.config import LlamaConfig
from jlora.errors import CorruptError, UnsupportedError, UsageError, listing

_PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_BLOCKS = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    *("IQ4_NL", "IQ4_XS"),
)
_MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_ROPE_FREQS = "rope_freqs.weight"
_EXPERTS = re.compile(r"blk\.\d+\.ffn_(\w+_exps|\w+_shexp|gate_inp|\w+\.\d+)\..*")
# Metadata that changes the computation, with the value that leaves a Llama a Llama.
_MUST_BE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "llama.expert_count": (None, 0),
    "llama.logit_scale": (None, 1.0),
    "llama.embedding_scale": (None, 1.0),
    "llama.residual_scale": (None, 1.0),
    "llama.attention.scale": (None, 0.0),
    "llama.attention.sliding_window": (None, 0),
    "llama.attention.causal": (None, True),
    "llama.attention.max_alibi_bias": (None, 0.0),
    "llama.attention.clamp_kqv": (None, 0.0),
    "llama.attn_logit_softcapping": (None, 0.0),
    "llama.final_logit_softcapping": (None, 0.0),
    "llama.rope.scaling.attn_factor": (None, 1.0),
    "llama.rope.scaling.alpha": (None, 0.0),
    "llama.rope.scaling.yarn_attn_factor": (None, 1.0),
    "llama.rope.scaling.yarn_ext_factor": (None, 1.0, -1.0),
    "llama.rope.scaling.yarn_log_multiplier": (None, 0.0),
    "split.count": (None, 0, 1),
}


def open_gguf(path: Path) -> Source:
    """Returns the Llama of a GGUF file.

    Raises:
        UsageError: the gguf package is not installed.
        UnsupportedError: another architecture, block format or tokenizer.
        CorruptError: a damaged file, or tensors that do not fit the metadata.
    """
    gguf = _import_gguf(path)
    file = read_gguf(path)
    _refuse_other_models(file)
    kinds = _kinds(gguf, file)
    hf_config = _hf_config(file, kinds)
    config = parse_config(hf_config, f"{path}: its metadata as ")
    names = {name.path: name for name in all_names(config)}
    stored = {path: _gguf_name(name.key) for path, name in names.items()}
    check_names(
        str(path),
        {k: v.shape for k, v in file.tensors.items() if k != _ROPE_FREQS},
        {stored[path]: name.hf_shape for path, name in names.items()},
    )

    def read(path: str, box: Index | None = None) -> np.ndarray:
        name = stored[path]
        array = _read_tensor(gguf, file.path, file.tensors[name], kinds[name])
        check_values(array, f"{file.path}: tensor {name!r}")
        array = names[path].to_params(_restore_rows(array, names[path], config))
        return array if box is None else array[box]

    return Source(
        kind="gguf",
        location=path,
        config=config,
        hf_config=hf_config,
        tensors={
            path: Spec(
                name.shape, np.dtype(_PLAIN.get(kinds[stored[path]], np.float32))
            )
            for path, name in names.items()
        },
        read=read,
        files=tokenizer_files(file),
        provenance={
            "format": "gguf",
            "source": str(path),
            "name": file.metadata.get("general.name"),
            "tensor_types": dict(sorted(Counter(kinds.values()).items())),
        },
        weights=(path,),
    )


def _import_gguf(path: Path) -> ModuleType:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise UsageError(
            f"{path}: reading GGUF needs the gguf package: pip install jlora[gguf]"
        ) from error
    return gguf


def _refuse_other_models(file: GGUFFile) -> None:
    kind = file.metadata.get("general.type", "model")
    architecture = file.metadata.get("general.architecture")
    if kind != "model" or architecture != "llama":
        raise UnsupportedError(
            f"{file.path}: general.type={kind!r}, general.architecture="
            f"{architecture!r}; jlora reads models of architecture 'llama' only"
        )
    for key, neutral in _MUST_BE_NEUTRAL.items():
        if file.metadata.get(key) not in neutral:
            hint = (
                "; join the parts with llama-gguf-split --merge"
                if key == "split.count"
                else " is not a plain Llama; jlora does not support it"
            )
            raise UnsupportedError(f"{file.path}: {key}={file.metadata[key]!r}{hint}")
    experts = [name for name in file.tensors if _EXPERTS.fullmatch(name)]
    if experts:
        raise UnsupportedError(
            f"{file.path}: a mixture of experts ({listing(experts, 4)}); "
            "jlora supports dense Llamas only"
        )


def _kinds(gguf: ModuleType, file: GGUFFile) -> dict[str, str]:
    """Returns the name of every tensor's ggml type, checking that its bytes are there."""
    known = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    kinds = {
        name: known.get(tensor.type, f"number {tensor.type}")
        for name, tensor in file.tensors.items()
    }
    unsupported = [
        f"{name} ({kind})"
        for name, kind in kinds.items()
        if kind not in _PLAIN and kind not in _BLOCKS
    ]
    if unsupported:
        raise UnsupportedError(
            f"{file.path}: tensors of types that are not read: {listing(unsupported)}; "
            f"jlora reads {listing([*_PLAIN, *_BLOCKS], 99)}"
        )
    problems, ends = [], {}
    for name, tensor in file.tensors.items():
        block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.type)]
        if not tensor.shape or tensor.shape[-1] % block:
            problems.append(
                f"{name!r} of shape {list(tensor.shape)} is no whole number of "
                f"{kinds[name]} blocks of {block}"
            )
            continue
        ends[name] = tensor.offset + _num_bytes(gguf, tensor)
        if ends[name] > file.size:
            problems.append(
                f"cut: {name!r} ends at byte {ends[name]:,}, the file at {file.size:,}"
            )
    if not problems:
        problems = _overlaps(file, ends)
    if problems:
        raise CorruptError(
            f"{file.path}: {listing(problems)}; copy or download it again"
        )
    return kinds


def _overlaps(file: GGUFFile, ends: dict[str, int]) -> list[str]:
    """Returns the tensors that start before another one's end."""
    order = sorted(ends, key=lambda name: (file.tensors[name].offset, ends[name]))
    return [
        f"{second!r} overlaps {first!r}"
        for first, second in itertools.pairwise(order)
        if file.tensors[second].offset < ends[first]
    ]


def _num_bytes(gguf: ModuleType, tensor: Tensor) -> int:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.type)]
    count = 1
    for length in tensor.shape:
        count *= length
    return count // block * size


def _read_tensor(gguf: ModuleType, path: Path, tensor: Tensor, kind: str) -> np.ndarray:
    data = read_bytes(path, tensor.offset, _num_bytes(gguf, tensor))
    if kind in _PLAIN:
        return data.view(_PLAIN[kind]).reshape(tensor.shape)
    rows = data.reshape(*tensor.shape[:-1], -1)
    with np.errstate(all="ignore"):  # a damaged scale is reported as NaN or infinity
        values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(tensor.type))
    return values.astype(np.float32, copy=False).reshape(tensor.shape)


def _restore_rows(array: np.ndarray, name: Name, config: LlamaConfig) -> np.ndarray:
    """Returns q and k in HF's row order (head, half, pair); others unchanged.

    The file has (head, pair, half); forgetting this loads cleanly and computes nonsense.
    """
    if ".q_proj." in name.key:
        heads = config.num_attention_heads
    elif ".k_proj." in name.key:
        heads = config.num_key_value_heads
    else:
        return array
    pairs = array.reshape(heads, config.head_dim // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _gguf_name(key: str) -> str:
    module, _, suffix = key.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", module)
    if layer:
        return f"blk.{layer[1]}.{_MODULES[layer[2]]}.{suffix}"
    return f"{_MODULES[module]}.{suffix}"


def _hf_config(file: GGUFFile, kinds: dict[str, str]) -> dict[str, Any]:
    """Returns the metadata as a config.json of HF."""
    get = file.metadata.get
    heads, hidden = get("llama.attention.head_count"), get("llama.embedding_length")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        raise CorruptError(
            f"{file.path}: llama.attention.head_count={heads!r} and "
            f"llama.embedding_length={hidden!r}; expected two integers above 0"
        )
    head_dim = get("llama.attention.key_length", hidden // heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if get(key, head_dim) != head_dim:
            raise UnsupportedError(
                f"{file.path}: {key}={get(key)} differs from the head size {head_dim}; "
                "jlora does not support it"
            )
    embedding = file.tensors.get("token_embd.weight")
    rows = embedding.shape[0] if embedding else None
    dtypes = Counter(kinds[k] for k, t in file.tensors.items() if len(t.shape) == 2)
    common = _PLAIN.get(max(dtypes, key=lambda k: dtypes[k], default=""), np.float32)
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "bos_token_id": get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": get("tokenizer.ggml.padding_token_id"),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": get("llama.feed_forward_length"),
        "max_position_embeddings": get("llama.context_length"),
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": get("llama.block_count"),
        "num_key_value_heads": get("llama.attention.head_count_kv", heads),
        "rms_norm_eps": _decimal(get("llama.attention.layer_norm_rms_epsilon")),
        "rope_scaling": _rope_scaling(file, head_dim),
        "rope_theta": _decimal(get("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": np.dtype(common).name,
        "vocab_size": rows,
    }


def _decimal(value: Any) -> Any:
    """Returns the shortest decimal that rounds to the same float32: 1e-05, as meant."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope_scaling(file: GGUFFile, head_dim: int) -> dict[str, Any] | None:
    """Returns the file's rotary scaling as HF's `rope_scaling`."""
    get = file.metadata.get
    # llama.cpp's default type is linear, and its older key means the same.
    kind = get("llama.rope.scaling.type") or "linear"
    factor = get("llama.rope.scaling.factor", get("llama.rope.scale_linear")) or 1.0
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedError(
            f"{file.path}: llama.rope.scaling.type={kind!r:.80}; jlora reads none, linear "
            "and yarn from GGUF, use the original model"
        )
    divisors = _rope_divisors(file, head_dim)
    if kind == "none" or (kind == "linear" and factor == 1):
        return _divided(file, head_dim, divisors)
    if divisors is not None:
        raise UnsupportedError(
            f"{file.path}: llama.rope.scaling.type={kind!r} together with {_ROPE_FREQS}; "
            "jlora supports one of them, use the original model"
        )
    scaling = {"rope_type": kind, "factor": _decimal(factor)}
    original = get("llama.rope.scaling.original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    if kind == "yarn":
        for key in ("beta_fast", "beta_slow"):
            value = get(f"llama.rope.scaling.yarn_{key}")
            if value is not None:
                scaling[key] = _decimal(value)
    return scaling


def _rope_divisors(file: GGUFFile, head_dim: int) -> np.ndarray | None:
    """Returns what each pair's frequency is divided by, or None if by nothing."""
    tensor = file.tensors.get(_ROPE_FREQS)
    if tensor is None:
        return None
    if tensor.shape != (head_dim // 2,) or tensor.type != 0:
        raise CorruptError(
            f"{file.path}: {_ROPE_FREQS} has shape {list(tensor.shape)} and type "
            f"{tensor.type}; expected F32 of shape [{head_dim // 2}]"
        )
    divisors = read_bytes(file.path, tensor.offset, 2 * head_dim).view(np.float32)
    if not (np.isfinite(divisors).all() and (divisors > 0).all()):
        raise CorruptError(
            f"{file.path}: {_ROPE_FREQS} holds values that are not above 0; the file is "
            "damaged, use another copy"
        )
    return None if (divisors == 1).all() else divisors


def _divided(
    file: GGUFFile, head_dim: int, divisors: np.ndarray | None
) -> dict[str, Any] | None:
    """Returns the divisors as llama3, if its numbers reproduce them, else as longrope."""
    if divisors is None:
        return None
    llama3 = {
        "rope_type": "llama3",
        "factor": _decimal(float(divisors[-1])),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theta = file.metadata.get("llama.rope.freq_base", 10000.0)
    expected = _llama3_divisors(theta, head_dim, llama3)
    if divisors[-1] >= 1 and np.allclose(divisors, expected, rtol=1e-5):
        return llama3
    values = [float(value) for value in divisors]
    return {
        "rope_type": "longrope",
        "short_factor": values,
        "long_factor": values,
        "attention_factor": 1.0,
        "factor": 1.0,
        "original_max_position_embeddings": file.metadata.get("llama.context_length"),
    }


def _llama3_divisors(
    theta: float, head_dim: int, scaling: dict[str, Any]
) -> np.ndarray:
    """Returns what llama.cpp's converter stores for rope type llama3."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (kept + (1 - kept) / scaling["factor"])
