"""Adapters that PEFT saved, with what PEFT computes, for the tests of both directions."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

import convert
from convert.peft import attach_adapter
from convert.source import Dtype

# Made by tests/golden/make_adapters_golden.py with PEFT.
GOLDEN = Path(__file__).parent / "golden" / "adapters"
ALL = sorted(path.name for path in GOLDEN.iterdir() if not path.name.startswith("_"))
# What jlora refuses, by name.
REFUSED = [
    "bf16_dora",
    "bf16_embed_lm_head",
    "bf16_modules_to_save",
    "bias_all",
    "bias_lora_only",
    "dora",
    "dora_embed",
    "dora_rslora",
    "embed",
    "lm_head",
    "lora_bias",
    "modules_to_save",
    "modules_to_save_norm",
    "olora",
    "pissa",
    "resized_vocab",
    "tied_embed",
    "tied_embed_ensured",
    "tied_lm_head",
    "tied_modules_to_save",
    "tied_modules_to_save_ensured",
    "tied_trainable_tokens",
    "trainable_tokens",
]
CASES = [name for name in ALL if name not in REFUSED]


class Case(NamedTuple):
    folder: Path
    base: Path
    expected: dict[str, np.ndarray]

    @property
    def tokens(self) -> Any:
        return jnp.asarray(self.expected["input_ids"])

    def load(
        self, dtype: Dtype = "float32"
    ) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        model, params = convert.load(str(self.base), dtype=dtype)
        return model, params, attach_adapter(params, model.config, self.folder)


@functools.cache
def golden(name: str) -> Case:
    folder = GOLDEN / name
    config = json.loads((folder / "adapter_config.json").read_text())
    with np.load(folder / "expected.npz") as file:
        expected = dict(file)
    return Case(folder, GOLDEN / config["base_model_name_or_path"], expected)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {
        key: value
        for file in sorted(folder.glob("*.safetensors"))
        for key, value in safetensors.numpy.load_file(file).items()
    }


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype.itemsize == 2 else array


def changed_copy(folder: Path, source: str, config=None, arrays=None) -> Path:
    """Copies a golden adapter, with settings merged in and tensors passed through."""
    shutil.copytree(GOLDEN / source, folder)
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text()) | (config or {})
    file.chmod(0o644)
    file.write_text(json.dumps(settings))
    if arrays is not None:
        weights = folder / "adapter_model.safetensors"
        weights.chmod(0o644)
        safetensors.numpy.save_file(arrays(tensors(folder)), weights)
    return folder
