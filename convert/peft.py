"""PEFT LoRA adapters: folders and runs in, trees with adapters out, and back.

Both directions share one value, `Adapter`, which is checked when it is made: ranks agree
with the settings, so a scaling can be trusted. Reading refuses what PEFT lets pass with a
warning while it serves the base model. The file is long because every fault of a key or
a shape has its own sentence.

Source: PEFT 0.21 `utils/save_and_load.py`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.names import Params, all_names, module_name, module_path
from convert.peft_config import MERGE_FIRST, config_to_write, read_config, warn
from convert.safetensors import (
    Entry,
    Spec,
    atomic_folder,
    read_header,
    read_tensor,
    write_safetensors,
)
from convert.source import first_non_finite, inside_folder, read_json
from jlora.checkpoint import flatten, newest_adapter
from jlora.config import LlamaConfig, LoraConfig
from jlora.errors import CorruptError, UnsupportedError, UsageError, listing, nearest
from jlora.lora import linear_modules, with_adapter
from jlora.targets import select_modules

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FORM = f"{_PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
_KEY = re.compile(rf"{re.escape(_PREFIX)}(.+)\.(lora_[AB])(?:\.default)?\.weight")
_TABLE_KEY = re.compile(r"(.*\.)?(embed_tokens|lm_head)\..*")
_TABLES = ["model.embed_tokens", "lm_head"]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in jlora's layout, and where it belongs."""

    config: LoraConfig
    tensors: dict[str, dict[str, np.ndarray]]
    """Params path of a module -> lora_A [in, R] and lora_B [R, out], float32."""
    scalings: dict[str, float]
    """Params path of a module -> alpha / R, or alpha / sqrt(R)."""
    base_model_name_or_path: str | None
    revision: str | None
    location: Path
    """What it was read from, for messages; never written."""

    @classmethod
    def make(
        cls,
        config: LoraConfig,
        tensors: dict[str, dict[str, np.ndarray]],
        location: Path,
        base_model_name_or_path: str | None,
        revision: str | None = None,
    ) -> "Adapter":
        """Returns the adapter of these tensors, with scalings as the settings say.

        Raises:
            CorruptError: the settings give a module another rank than its tensors have.
        """
        every_module = replace(
            config,
            target_modules=[module_name(path) for path in tensors],
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )
        selected = _select(every_module, every_module.target_modules, location)
        wrong = [
            f"{name} has rank {tensors[module_path(name)]['lora_A'].shape[1]}, the "
            f"settings say {rank}"
            for name, (rank, _) in selected.items()
            if tensors[module_path(name)]["lora_A"].shape[1] != rank
        ]
        if wrong:
            raise CorruptError(
                f"{location}: r or rank_pattern disagree with the tensors: "
                f"{listing(wrong)}"
            )
        scalings = {module_path(name): s for name, (_, s) in selected.items()}
        return cls(
            config, tensors, scalings, base_model_name_or_path, revision, location
        )


def _select(
    config: LoraConfig, names: Any, location: Path
) -> dict[str, tuple[int, float]]:
    """Returns what `select_modules` does; for a file, a contradiction is damage."""
    try:
        return select_modules(config, names, strict=False)
    except UsageError as error:
        raise CorruptError(f"{location / CONFIG}: {error}") from error
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{location / CONFIG}: {error}; {MERGE_FIRST}"
        ) from error


def find_adapter(folder: str | Path) -> Path | None:
    """Returns the folder in PEFT's form that `folder` is or, as a run, holds.

    Returns:
        None for a run that has checkpoints only.

    Raises:
        UsageError: neither an adapter nor a run.
    """
    folder = Path(folder)
    for candidate in (folder, folder / "adapter"):
        if (candidate / CONFIG).is_file():
            return candidate
    if (folder / "checkpoints").is_dir():
        return None
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give an adapter or run folder")
    named = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    hint = f"; did you mean its subfolder {listing(named)}?" if named else ""
    raise UsageError(f"{folder}: neither {CONFIG} nor a run's checkpoints in it{hint}")


def open_adapter(folder: str | Path) -> Adapter:
    """Returns the adapter of a PEFT folder, or of a run: its newest checkpoint if need be.

    Raises:
        UsageError: neither an adapter nor a run.
        UnsupportedError, CorruptError: as `read_adapter`.
    """
    found = find_adapter(folder)
    if found is not None:
        return read_adapter(found)
    config, tree, meta = newest_adapter(Path(folder))
    base = meta["settings"]["model"]
    return Adapter.make(config, _modules(tree), Path(folder), base)


def read_adapter(folder: str | Path) -> Adapter:
    """Returns the adapter of a PEFT folder, every value checked; all in float32.

    Raises:
        UnsupportedError: a PEFT feature that jlora does not have.
        CorruptError: damaged, incomplete or contradicting files.
    """
    folder = Path(folder)
    document = read_json(folder, CONFIG)
    config = read_config(document, f"{folder / CONFIG}")
    if not (folder / WEIGHTS).exists():
        if (folder / "adapter_model.bin").exists():
            raise UnsupportedError(
                f"{folder}: adapter_model.bin is a pickle, which is never opened as it "
                "may run code; load the adapter with PEFT where you trust it and save "
                "it again with save_pretrained(folder)"
            )
        raise CorruptError(f"{folder}: {CONFIG} without {WEIGHTS}; copy both")
    pairs = _read_keys(read_header(inside_folder(folder, WEIGHTS)), folder / WEIGHTS)
    tensors = {
        path: {
            leaf: _read_leaf(entry, f"{folder / WEIGHTS}: {_key(path, leaf)}")
            for leaf, entry in pair.items()
        }
        for path, pair in pairs.items()
    }
    if not any(pair["lora_B"].any() for pair in tensors.values()):
        warn(f"{folder / WEIGHTS}: every lora_B is zero, so it changes nothing")
    return Adapter.make(
        config,
        tensors,
        folder,
        document.get("base_model_name_or_path"),
        document.get("revision"),
    )


def _read_keys(entries: dict[str, Entry], where: Path) -> dict[str, dict[str, Entry]]:
    """Returns {params path: {leaf: entry}}; all that is wrong with keys at once."""
    tables = sorted(key for key in entries if _TABLE_KEY.fullmatch(key))
    if tables:
        raise UnsupportedError(
            f"{where}: adapters and whole weights of the embedding and the head are not "
            f"supported ({listing(tables)}); {MERGE_FIRST} (if the base ties its head "
            "to the embedding, untie it first, as PEFT merges such adapters wrongly)"
        )
    pairs: dict[str, dict[str, Entry]] = {}
    problems, strange = [], []
    for key, entry in sorted(entries.items()):
        match = _KEY.fullmatch(key.replace("_orig_mod.", ""))
        if match is None:
            strange.append(key)
            continue
        pair = pairs.setdefault(module_path(match[1]), {})
        if match[2] in pair:
            problems.append(f"two tensors for {match[1]}.{match[2]}")
        pair[match[2]] = entry
    if strange:
        known = [_key(path, leaf) for path in pairs for leaf in ("lora_A", "lora_B")]
        problems.append(
            f"keys that are not of the form {_FORM}: "
            + listing([f"{key}{nearest(key, known)}" for key in strange])
        )
    problems += [
        f"{_key(path, leaf)} is missing"
        for path, pair in pairs.items()
        for leaf in ("lora_A", "lora_B")
        if leaf not in pair
    ]
    problems += [
        text for path, pair in pairs.items() for text in _bad_shapes(path, pair)
    ]
    if problems or not pairs:
        raise CorruptError(f"{where}: {listing(problems) or 'no tensors'}")
    return pairs


def _bad_shapes(path: str, pair: dict[str, Entry]) -> list[str]:
    shapes = {leaf: list(entry.shape) for leaf, entry in pair.items()}
    bad = [
        f"{_key(path, leaf)} {shape} is not a matrix"
        for leaf, shape in shapes.items()
        if len(shape) != 2
    ]
    if not bad and len(pair) == 2 and shapes["lora_A"][0] != shapes["lora_B"][1]:
        bad = [
            f"{_key(path, 'lora_A')} {shapes['lora_A']} and {_key(path, 'lora_B')} "
            f"{shapes['lora_B']} have different ranks"
        ]
    return bad


def _read_leaf(entry: Entry, where: str) -> np.ndarray:
    """Returns one factor in jlora's layout, contiguous float32."""
    if entry.dtype == np.float64:
        raise UnsupportedError(f"{where}: float64; save the adapter in float32")
    array = read_tensor(entry)
    index = first_non_finite(array)
    if index is not None:
        raise CorruptError(
            f"{where}: {array[index]} at {list(index)}; train or copy the adapter again"
        )
    return np.ascontiguousarray(array.T, np.float32)


def check_fit(adapter: Adapter, config: LlamaConfig) -> None:
    """Checks that the adapter has exactly the tensors its settings select in the model.

    Raises:
        UnsupportedError: the settings select the embedding or the head.
        CorruptError: lists all missing, surplus and misshapen tensors.
    """
    shapes = {
        name.path.removesuffix("/kernel"): name.shape
        for name in all_names(config)
        if name.path.endswith("/kernel")
    }
    linears = [module_name(path) for path in shapes]
    # Ranks and alphas were matched when the adapter was made.
    rules = replace(adapter.config, rank_pattern={}, alpha_pattern={})
    names = [*(name for name in linears if name not in _TABLES), *_TABLES]
    expected = {module_path(name) for name in _select(rules, names, adapter.location)}
    targets = rules.target_modules
    rule = targets if isinstance(targets, str | None) else listing(targets)
    problems = [
        f"target_modules={rule} selects {module_name(path)}, which has no tensors"
        for path in sorted(expected - adapter.tensors.keys())
    ]
    for path, pair in sorted(adapter.tensors.items()):
        name = module_name(path)
        if path not in shapes:
            problems.append(f"the model has no {name}{nearest(name, linears)}")
        elif path not in expected:
            problems.append(f"target_modules={rule} does not select {name}")
        else:
            problems += _misfits(path, pair, shapes[path])
    if problems:
        raise CorruptError(
            f"{adapter.location}: does not fit the model: {listing(problems)}"
        )


def _misfits(
    path: str, pair: Mapping[str, np.ndarray], shape: tuple[int, ...]
) -> list[str]:
    rank = pair["lora_A"].shape[1]
    expected = {"lora_A": (shape[0], rank), "lora_B": (rank, shape[1])}
    return [
        f"{_key(path, leaf)} {list(pair[leaf].shape[::-1])} instead of "
        f"{list(want[::-1])} ({path}/{leaf} {list(pair[leaf].shape)} instead of "
        f"{list(want)})"
        for leaf, want in expected.items()
        if pair[leaf].shape != want
    ]


def attach_adapter(
    params: Params, config: LlamaConfig, adapter: str | Path | Adapter
) -> Params:
    """Returns the tree with an adapter's leaves beside its kernels; nothing is copied.

    Args:
        params: the base model.
        config: its architecture.
        adapter: a PEFT folder, a run folder, or what `open_adapter` returned.

    Raises:
        UsageError, UnsupportedError, CorruptError: as `open_adapter`, `check_fit`.
    """
    if not isinstance(adapter, Adapter):
        adapter = open_adapter(adapter)
    check_fit(adapter, config)
    leaves = {
        module_name(path): {
            "lora_A": jnp.asarray(pair["lora_A"]),
            "lora_B": jnp.asarray(pair["lora_B"]),
            "lora_scaling": jnp.float32(adapter.scalings[path]),
        }
        for path, pair in adapter.tensors.items()
    }
    return with_adapter(params, leaves)


def write_adapter(
    params: Params,
    lora_config: LoraConfig,
    folder: str | Path,
    base_model_name_or_path: str | None,
    revision: str | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a tree's adapter as a PEFT folder; the same input gives the same bytes.

    Args:
        params: a tree with lora_A and lora_B leaves; the base's leaves may be absent.
        lora_config: what it was trained with.
        folder: appears whole or not at all.
        base_model_name_or_path: where PEFT finds the base.
        revision: of the base on the hub.
        overwrite: replace an adapter that is there.

    Raises:
        UsageError: the tree has no adapter, or the folder cannot be written.
    """
    where = Path(folder)
    tensors = _modules(params)
    if not tensors:
        raise UsageError(f"{where}: nothing to write, the parameters have no adapter")
    adapter = Adapter.make(
        lora_config, tensors, where, base_model_name_or_path, revision
    )
    save_adapter(
        adapter, where, linears=list(linear_modules(params)), overwrite=overwrite
    )


def save_adapter(
    adapter: Adapter,
    folder: Path,
    *,
    linears: list[str] | None = None,
    overwrite: bool = False,
    source: Path | None = None,
) -> None:
    """Writes an adapter as a PEFT folder that every PEFT since 0.6 reads.

    Args:
        adapter: what to write.
        folder: appears whole or not at all.
        linears: HF names of the base's linear layers, if they are known.
        overwrite: replace an adapter that is there.
        source: what the adapter comes from; must not lie inside `folder`.
    """
    names = {module_name(path): path for path in adapter.tensors}
    settings = config_to_write(
        adapter.config,
        {name: adapter.tensors[names[name]]["lora_A"].shape[1] for name in names},
        {name: adapter.scalings[names[name]] for name in names},
        linears,
    )
    settings["base_model_name_or_path"] = adapter.base_model_name_or_path
    settings["revision"] = adapter.revision
    text = json.dumps(settings, indent=2, sort_keys=True)
    arrays = {
        _key(path, leaf): array
        for path, pair in adapter.tensors.items()
        for leaf, array in pair.items()
    }
    specs = {key: Spec(array.shape[::-1], array.dtype) for key, array in arrays.items()}
    with atomic_folder(folder, overwrite, source) as temporary:
        write_safetensors(temporary / WEIGHTS, specs, lambda key: arrays[key].T)
        (temporary / CONFIG).write_text(text + "\n", "utf-8")


def _key(path: str, leaf: str) -> str:
    return f"{_PREFIX}{module_name(path)}.{leaf}.weight"


def _modules(tree: Params) -> dict[str, dict[str, np.ndarray]]:
    """Returns the adapted modules of a tree by params path, contiguous float32."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for dotted, leaf in flatten(tree).items():
        path, _, name = dotted.replace(".", "/").rpartition("/")
        if name in ("lora_A", "lora_B"):
            found.setdefault(path, {})[name] = np.ascontiguousarray(leaf, np.float32)
    return found
