"""Adapters of other tools: mlx-lm's are read, others are refused by the tool's name.

mlx-lm computes x W + scale (x lora_a) lora_b with lora_a [in, r] and lora_b [r, out].
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.config.lora_config import LoraConfig
from jlora.errors import CorruptError, UnsupportedError, listing
from jlora.formats.model_files import inside_folder
from jlora.formats.peft.adapter import Adapter
from jlora.formats.safetensors_file import Entry, read_header, read_tensor
from jlora.formats.tensor_checks import first_non_finite
from jlora.formats.tensor_names import module_path

MLX_WEIGHTS = "adapters.safetensors"
_MLX_KEY = re.compile(r"(.+)\.(lora_[ab])")
_AS_PEFT = "save it as a PEFT adapter there, or merge it and give the merged model"
_FILES = {
    "lit_model.pth.lora": "litgpt's, a pickle that is never opened; merge it there "
    "(litgpt merge_lora), convert the model (litgpt convert_from_litgpt) and give that",
    "adapter_*.pt": f"torchtune's, a pickle that is never opened; {_AS_PEFT} "
    "(its checkpointer writes adapter_model.safetensors)",
    "adapters.npz": "an old mlx-lm's; fuse it into its model there (mlx_lm.fuse)",
}
_TORCHTUNE_KEY = re.compile(r"layers\.\d+\.(attn|mlp)\.\w+\.lora_[ab]\.weight")
_LITGPT_KEY = re.compile(r"transformer\.h\.\d+\..+\.lora_[AB]")


def refuse_other_adapter(path: Path) -> None:
    """Raises UnsupportedError if a folder or file holds an adapter of another tool."""
    if path.suffix == ".gguf" and path.is_file():
        raise UnsupportedError(
            f"{path}: a GGUF file, as llama.cpp's converter makes of a PEFT adapter; give "
            "the PEFT folder that it was made from"
        )
    for pattern, what in _FILES.items():
        if found := sorted(path.glob(pattern)):
            raise UnsupportedError(f"{found[0]}: an adapter of {what}")


def refuse_other_keys(keys: Iterable[str], where: Path) -> None:
    """Raises UnsupportedError if the names of an adapter's tensors are another tool's."""
    for key in keys:
        for tool, pattern in (("torchtune", _TORCHTUNE_KEY), ("litgpt", _LITGPT_KEY)):
            if pattern.search(key):
                raise UnsupportedError(
                    f"{where}: {key} is a name of {tool}'s, whose q and k have another "
                    f"order of rows; {_AS_PEFT}"
                )


def is_mlx(settings: Mapping[str, Any], folder: Path) -> bool:
    """Returns whether a folder holds an adapter of mlx-lm."""
    return "peft_type" not in settings and (
        "lora_parameters" in settings or (folder / MLX_WEIGHTS).exists()
    )


def read_mlx(settings: Mapping[str, Any], folder: Path) -> Adapter:
    """Reads an adapter of mlx-lm; the numbers are as its own.

    Raises:
        UnsupportedError: DoRA, or a model trained in full.
        CorruptError: damaged, incomplete or contradicting files.
    """
    where = folder / MLX_WEIGHTS
    kind = settings.get("fine_tune_type", "lora")
    if kind != "lora":
        raise UnsupportedError(
            f"{folder}: mlx-lm's fine_tune_type {kind!r}; jlora reads its lora only: "
            "fuse it into its model there (mlx_lm.fuse)"
        )
    parameters = settings.get("lora_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    rank, scale = parameters.get("rank"), parameters.get("scale")
    if (
        type(rank) is not int
        or rank < 1
        or isinstance(scale, bool)
        or not isinstance(scale, int | float)
    ):
        raise CorruptError(
            f"{folder}: lora_parameters of mlx-lm has rank {rank!r} and scale {scale!r}"
        )
    if not where.exists():
        raise CorruptError(f"{folder}: settings of mlx-lm without {MLX_WEIGHTS}")
    tensors: dict[str, dict[str, np.ndarray]] = {}
    strange = []
    for key, entry in sorted(read_header(inside_folder(folder, MLX_WEIGHTS)).items()):
        match = _MLX_KEY.fullmatch(key)
        if match is None:
            strange.append(key)
            continue
        leaf = {"lora_a": "lora_A", "lora_b": "lora_B"}[match[2]]
        tensors.setdefault(match[1], {})[leaf] = _read(entry, f"{where}: {key}")
    wrong = [
        module
        for module, pair in tensors.items()
        if len(pair) != 2
        or any(array.ndim != 2 for array in pair.values())
        or pair["lora_A"].shape[1] != pair["lora_B"].shape[0]
    ]
    if strange or wrong or not tensors:
        raise CorruptError(
            f"{where}: {listing(strange + wrong, 2) or 'no tensors'}: not pairs of "
            "matrices lora_a [in, r] and lora_b [r, out]"
        )
    model = settings.get("model")
    config = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        target_modules=list(tensors),
        base_model_name_or_path=model if isinstance(model, str) else None,
    )
    placed = {module_path(module): pair for module, pair in tensors.items()}
    return Adapter.make(config, placed, folder)


def _read(entry: Entry, where: str) -> np.ndarray:
    array: Any = read_tensor(entry)
    index = first_non_finite(array)
    if index is not None:
        raise CorruptError(f"{where}: {array[index]} at {list(index)}")
    return np.ascontiguousarray(array.astype(np.float32))
