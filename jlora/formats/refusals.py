"""Recognises what jlora does not read, by file name, first bytes or tensor names.

Each function raises an error that says what was found and what to do instead.
"""

import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path

from jlora.errors import CorruptError, UnsupportedError, listing

_SAVE_AS = (
    "load the model with transformers where you trust it and save it again with "
    "save_pretrained(folder), which writes safetensors"
)
_PICKLED = f"pickled weights, which are never opened as they may run code; {_SAVE_AS}"
META = (
    "Meta's layout, whose rotary pairs are interleaved; use HF's conversion script "
    "(transformers, convert_llama_weights_to_hf.py)"
)
ADAPTER = (
    "an adapter, not a model; give the base model here and this folder as the adapter"
)
_FILES = {
    "consolidated*.pth": META,
    **dict.fromkeys(("*.bin", "*.pth", "*.pt", "*.ckpt", "*.pkl"), _PICKLED),
    "*.msgpack": f"Flax weights; {_SAVE_AS}",
    "*.h5": f"TensorFlow weights; {_SAVE_AS}",
    "*.npz": f"NumPy weights; {_SAVE_AS}",
    "*.onnx": "an inference graph; use the model it was made from",
    "*.ggml": "an obsolete format; use a .gguf file or the original model",
    "*.gguf": "GGUF weights; give the path of the .gguf file itself",
    "adapter_model.safetensors": ADAPTER,
    "consolidated*.safetensors": "Meta's tensor names; use the model.safetensors files "
    "of the same repository",
}
_QUANTISED = re.compile(
    r".*\.(qweight|qzeros|scales|g_idx|(weight|input)_scale(_inv)?|weight_packed|absmax"
    r"|quant_map|quant_state\..*|SCB|weight_(shape|zero_point)|nested_\w+)"
)
# What a tensor name that no Llama has means -> pattern of such names.
_OTHER_MODELS = {
    "an adapter that was not merged; merge it with PEFT, or give base and adapter apart": (
        r".*\.(lora_[AB]|lora_embedding_[AB]|base_layer|lora_magnitude_vector)\b.*"
    ),
    "a mixture of experts": (
        r".*\.(block_sparse_moe|experts|shared_experts?|router)\..*|.*\.mlp\.gate\.weight"
    ),
    "one matrix for q, k and v or for gate and up (Phi-3, Baichuan, InternLM2)": (
        r".*\.(qkv_proj|gate_up_proj|query_key_value|W_pack|wqkv|c_attn)\..*"
    ),
    "latent attention (DeepSeek-V2, MiniCPM3)": (
        r".*\.(kv_a_proj\w*|kv_b_proj|q_a_proj|q_b_proj|kv_a_layernorm)\..*"
    ),
    "norms on q and k (Qwen3, OLMo2)": r".*\.[qk]_(norm|layernorm)\..*",
    "norms around the MLP (Gemma 2)": r".*\.(pre|post)_feedforward_layernorm\..*",
    "norms with a bias": r".*layernorm\.bias|(model\.)?norm\.bias",
    "attention sinks": r".*\.sinks",
    "a learned activation (Apertus)": r".*\.act_fn\..*",
    "a model of images": (
        r"(.*\.)?(vision_\w+|visual|multi_modal_projector|cross_attn\w*)\..*"
    ),
}


def refuse_other_weights(folder: Path, files: list[str]) -> None:
    """Raises UnsupportedError if a file of another known format is among the names."""
    for pattern, what in _FILES.items():
        found = fnmatch.filter(files, pattern)
        if found:
            raise UnsupportedError(f"{folder}: only {listing(found)} found: {what}")


def refuse_other_file(path: Path) -> None:
    """Raises UnsupportedError if the name of a file is that of another known format."""
    for pattern, what in _FILES.items():
        if fnmatch.fnmatch(path.name, pattern):
            raise UnsupportedError(f"{path}: {what}")


def refuse_quantised(where: str, names: Iterable[str]) -> None:
    """Raises UnsupportedError if the tensor names are of a quantised checkpoint."""
    found = sorted(name for name in names if _QUANTISED.fullmatch(name))
    if found:
        raise UnsupportedError(
            f"{where}: a quantised checkpoint ({listing(found, 4)}); use the original "
            "bfloat16, float16 or float32 model"
        )


def refuse_other_models(where: str, names: Iterable[str]) -> None:
    """Raises UnsupportedError if the tensor names are of another architecture.

    config.json is not enough: checkpoints of others are renamed to make them loadable.
    """
    names = set(names)
    reasons = []
    for reason, pattern in _OTHER_MODELS.items():
        found = sorted(filter(re.compile(pattern).fullmatch, names))
        if found:
            reasons.append(f"{reason}: {listing(found, 2)}")

    def has(end: str) -> bool:
        return any(name.endswith(end) for name in names)

    if has("self_attn.q_proj.bias") and not has("self_attn.o_proj.bias"):
        reasons.append("biases on q, k and v but not on o (Qwen2)")
    if has("mlp.up_proj.weight") and not has("mlp.gate_proj.weight"):
        reasons.append("an MLP without a gate (Arcee, Nemotron)")
    if has("input_layernorm.weight") and not has("post_attention_layernorm.weight"):
        reasons.append("attention and MLP in parallel (Cohere)")
    if reasons:
        raise UnsupportedError(
            f"{where}: not a plain Llama, its tensors say: {'; '.join(reasons)}; "
            "jlora has no such layers"
        )


def refuse_other_format(path: Path, first: bytes, wanted: str) -> None:
    """Refuses a file whose first bytes are of another known format.

    Args:
        path: the file.
        first: at least its first nine bytes.
        wanted: "safetensors", "GGUF" or "text".

    Raises:
        CorruptError: a pointer or a web page instead of the file.
        UnsupportedError: another format of weights under this name.
    """
    start = first.lstrip().lower()
    if first.startswith(b"version https://git-lfs"):
        raise CorruptError(
            f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull`"
        )
    if start.startswith((b"<!doc", b"<html", b"<?xml")):
        raise CorruptError(
            f"{path}: a saved web page, not the file itself; download it again"
        )
    if first.startswith(b"GGUF") and wanted != "GGUF":
        raise UnsupportedError(
            f"{path}: a GGUF file under another name; rename it to end in .gguf and "
            "give the path of the file itself"
        )
    if first.startswith(b"PK\x03\x04") or (
        first[:1] == b"\x80" and first[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    ):
        raise UnsupportedError(
            f"{path}: a pickled PyTorch file (or another zip) under another name; it is "
            "never opened, as it may run code; save the model as safetensors "
            "(save_pretrained of transformers does)"
        )
    length = int.from_bytes(first[:8], "little")
    if wanted == "GGUF" and first[8:9] == b"{" and length < 1 << 40:
        raise UnsupportedError(
            f"{path}: a safetensors file under another name; give the folder that holds "
            "it and its config.json"
        )
