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
from helpers import GOLDEN
from jlora.config.llama_config import LlamaConfig
from jlora.formats.model_source import Dtype
from jlora.formats.open_model import open_model
from jlora.formats.peft.adapter_placement import adapted_config
from jlora.formats.peft.adapter_reader import read_adapter
from jlora.formats.peft.attach_adapter import attach_adapter
from jlora.lora.adapter_tree import module_at

# Made by tests/golden/make_adapters_golden.py with PEFT.
GOLDEN = GOLDEN / "adapters"
ALL = sorted(path.name for path in GOLDEN.iterdir() if not path.name.startswith("_"))
# What jlora refuses, by name.
REFUSED = ["lora_bias"]
CASES = [name for name in ALL if name not in REFUSED]
# Keys of `basic`.
Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
HEAD = "base_model.model.lm_head.weight"
SEVEN = sorted(
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
)


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
        """Returns the adapted model, the base's parameters and those with the adapter."""
        return _load(self.folder, self.base, dtype)


@functools.cache
def _base(folder: Path, dtype: Dtype) -> tuple[Any, dict[str, Any]]:
    return convert.load(str(folder), dtype=dtype)


@functools.cache
def _load(folder: Path, base: Path, dtype: Dtype) -> Any:
    model, params = _base(base, dtype)
    adapter = read_adapter(folder)
    adapted = attach_adapter(params, model.config, adapter)
    config = adapted_config(adapter, model.config)
    return model.clone(config=config), params, adapted


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


def weight_of(params: dict[str, Any], key: str) -> np.ndarray:
    """Returns the tensor of an HF key, in HF's layout; a tied head is the embedding."""
    tied = key == "lm_head.weight" and "lm_head" not in params
    name, _, kind = ("model.embed_tokens.weight" if tied else key).rpartition(".")
    leaves = module_at(params, name)
    leaf = kind if kind == "bias" else next(x for x in leaves if x != "bias")
    array = np.asarray(leaves[leaf])
    return np.ascontiguousarray(array.T if leaf == "kernel" else array)


def assert_merged(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    """Compares bits, or where PEFT's own depend on the order of summation, nearly."""
    found = bits(found)
    if "dora" in name and found.dtype == np.uint16:
        steps = np.abs(found.astype(int) - expected.astype(int))
        assert steps.max() <= 1
        assert (steps > 0).mean() < 0.01
    elif "dora" in name or name in ("pissa", "olora"):
        limit = 5e-7 if "dora" in name else 1e-5
        np.testing.assert_allclose(found, expected, rtol=0, atol=limit)
    else:
        np.testing.assert_array_equal(found, expected)


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


# What `changed_copy` passes tensors through.
def without(*keys: str):
    return lambda arrays: {k: v for k, v in arrays.items() if k not in keys}


def renamed(old: str, new: str):
    return lambda arrays: {k.replace(old, new): v for k, v in arrays.items()}


def with_more(*keys: str):
    return lambda arrays: arrays | dict.fromkeys(keys, arrays[A])


def with_value(key: str, make):
    return lambda arrays: arrays | {key: np.ascontiguousarray(make(arrays[key]))}


def config_of(base: str) -> LlamaConfig:
    return open_model(str(GOLDEN / "_base" / base)).config


def read_settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    """Returns {relative path: content} of every file."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
