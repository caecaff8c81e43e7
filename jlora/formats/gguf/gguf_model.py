"""Opens GGUF files, and reads their tensors, quantised blocks as float32, one at a time.

Source: llama.cpp, convert_hf_to_gguf.py and src/llama-model.cpp; gguf.constants.
"""

import itertools
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jlora.errors import CorruptError, UnsupportedError, UsageError, listing
from jlora.formats.array_blocks import Index
from jlora.formats.gguf.gguf_config import ROPE_FREQS, to_hf_config
from jlora.formats.gguf.gguf_file import PLAIN, GGUFFile, Tensor, read_gguf
from jlora.formats.gguf.gguf_layout import gguf_name, restore_rows
from jlora.formats.gguf.gguf_tokenizer import tokenizer_files
from jlora.formats.model_source import ModelSource, parse_config
from jlora.formats.safetensors_file import Spec, read_bytes
from jlora.formats.tensor_checks import check_names, check_values
from jlora.formats.tensor_names import all_names

_BLOCKS = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    *("IQ4_NL", "IQ4_XS"),
)
_EXPERTS = re.compile(r"blk\.\d+\.ffn_(\w+_exps|\w+_shexp|gate_inp|\w+\.\d+)\..*")
# As `rotary_emb.inv_freq` in old files of Hugging Face.
_ROT_EMBD = re.compile(r"blk\.\d+\.attn_rot_embd(\.weight)?")
# Metadata that changes the computation -> the values with which the model is a Llama.
_MUST_BE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "llama.expert_count": (None, 0),
    "llama.logit_scale": (None, 1.0),
    "llama.embedding_scale": (None, 1.0),
    "llama.residual_scale": (None, 1.0),
    "llama.attention.scale": (None, 0.0),
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


def open_gguf(path: Path) -> ModelSource:
    """Opens a GGUF file.

    Raises:
        UsageError: the gguf package is not installed.
        UnsupportedError: another architecture, block format or tokenizer.
        CorruptError: a damaged file, or tensors that do not fit the metadata.
    """
    gguf = import_gguf(path)
    file = read_gguf(path)
    _refuse_other_models(file)
    type_names = _type_names(gguf, file)
    hf_config = to_hf_config(file, type_names)
    config = parse_config(hf_config, f"{path}: its metadata as ")
    names = {name.path: name for name in all_names(config)}
    stored = {path: gguf_name(name.key) for path, name in names.items()}
    check_names(
        str(path),
        {k: v.shape for k, v in file.tensors.items() if not _is_rotary(k)},
        {stored[path]: name.hf_shape for path, name in names.items()},
    )

    def read(path: str, box: Index | None = None) -> np.ndarray:
        name = stored[path]
        array = _read_tensor(gguf, file.path, file.tensors[name], type_names[name])
        check_values(array, f"{file.path}: tensor {name!r}")
        array = names[path].to_params(restore_rows(array, names[path], config))
        return array if box is None else array[box]

    return ModelSource(
        kind="gguf",
        location=path,
        config=config,
        hf_config=hf_config,
        tensors={
            path: Spec(
                name.shape, np.dtype(PLAIN.get(type_names[stored[path]], np.float32))
            )
            for path, name in names.items()
        },
        read=read,
        files=tokenizer_files(file),
        provenance={
            "format": "gguf",
            "source": str(path),
            "name": file.metadata.get("general.name"),
            "tensor_types": dict(sorted(Counter(type_names.values()).items())),
        },
        weights=(path,),
    )


def import_gguf(path: Path) -> ModuleType:
    """Returns the gguf package.

    Raises:
        UsageError: it is not installed; `path` is the file that needs it.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise UsageError(
            f"{path}: GGUF needs the gguf package: pip install jlora[gguf]"
        ) from error
    return gguf


def _is_rotary(name: str) -> bool:
    """Returns whether a tensor holds rotary frequencies, which follow from the metadata."""
    return name == ROPE_FREQS or _ROT_EMBD.fullmatch(name) is not None


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


def _type_names(gguf: ModuleType, file: GGUFFile) -> dict[str, str]:
    """Returns {tensor: name of its ggml type}; checks that the file holds all of it."""
    known = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    type_names = {
        name: known.get(tensor.type, f"number {tensor.type}")
        for name, tensor in file.tensors.items()
    }
    unsupported = [
        f"{name} ({kind})"
        for name, kind in type_names.items()
        if kind not in PLAIN and kind not in _BLOCKS
    ]
    if unsupported:
        raise UnsupportedError(
            f"{file.path}: tensors of types that are not read: {listing(unsupported)}; "
            f"jlora reads {listing([*PLAIN, *_BLOCKS], 99)}"
        )
    problems, ends = [], {}
    for name, tensor in file.tensors.items():
        block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.type)]
        if not tensor.shape or tensor.shape[-1] % block:
            problems.append(
                f"{name!r} of shape {list(tensor.shape)} is no whole number of "
                f"{type_names[name]} blocks of {block}"
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
    return type_names


def _overlaps(file: GGUFFile, ends: dict[str, int]) -> list[str]:
    """Returns which tensors start before the end of another one."""
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
    if kind in PLAIN:
        return data.view(PLAIN[kind]).reshape(tensor.shape)
    rows = data.reshape(*tensor.shape[:-1], -1)
    with np.errstate(all="ignore"):  # a damaged scale is reported as NaN or infinity
        values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(tensor.type))
    return values.astype(np.float32, copy=False).reshape(tensor.shape)
