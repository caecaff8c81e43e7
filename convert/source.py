"""Where a model comes from: an HF folder, a hub id, a GGUF file or a converted base.

`open_source` checks names, shapes and dtypes before a byte of weights is read; a
`Source` then hands out one tensor at a time in jlora's layout.
"""

import fnmatch
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from convert.names import Name, Params, all_names
from convert.safetensors import (
    Entry,
    Spec,
    read_bytes,
    read_header,
    read_tensor,
    reading,
)
from jlora.config import LlamaConfig
from jlora.errors import (
    CorruptError,
    JloraError,
    UnsupportedError,
    UsageError,
    listing,
    nearest,
)
from jlora.strict_json import MAX_JSON_BYTES, parse_json_object

if TYPE_CHECKING:
    from jlora.model import Llama

Dtype = Literal["keep", "float32", "bfloat16", "float16"]
ShardingOf = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_INDEX_BYTES = 64 << 20
MAX_SIDE_FILE_BYTES = 256 << 20
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
_QUANTISED = re.compile(
    r".*\.(qweight|qzeros|scales|g_idx|weight_scale(_inv)?|weight_packed|absmax"
    r"|quant_map|quant_state\..*|SCB)"
)
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_SAVE_AS = (
    "load the model with transformers where you trust it and save it again with "
    "save_pretrained(folder), which writes safetensors"
)
_OTHER_WEIGHTS = {
    "consolidated*.pth": "Meta's layout, whose rotary pairs are interleaved; use HF's "
    "conversion script (transformers, convert_llama_weights_to_hf.py)",
    "*.bin": f"pickled weights, which are never opened as they may run code; {_SAVE_AS}",
    "*.pth": f"pickled weights, which are never opened as they may run code; {_SAVE_AS}",
    "*.pt": f"pickled weights, which are never opened as they may run code; {_SAVE_AS}",
    "*.ckpt": f"pickled weights, which are never opened as they may run code; {_SAVE_AS}",
    "*.msgpack": f"Flax weights; {_SAVE_AS}",
    "*.h5": f"TensorFlow weights; {_SAVE_AS}",
    "*.ggml": "an obsolete format; use a .gguf file or the original model",
    "*.gguf": "GGUF weights; give the path of the .gguf file itself",
    "adapter_model.safetensors": "an adapter, not a model; give the base model here and "
    "this folder as the adapter",
    "consolidated*.safetensors": "Meta's tensor names; use the model.safetensors files "
    "of the same repository",
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A checked model that can be read tensor by tensor, in jlora's layout."""

    kind: Literal["hf", "gguf", "base"]
    location: Path
    config: LlamaConfig
    hf_config: dict[str, Any]
    """config.json as found."""
    tensors: dict[str, Spec]
    """Params path -> shape and stored dtype, in HF's order."""
    read: Callable[[str], np.ndarray]
    """Params path -> array; a kernel may be a transposed view."""
    files: dict[str, bytes]
    """Tokenizer, template and generation files, verbatim."""
    provenance: dict[str, Any]
    """Where it came from, for jlora.json; free of times."""


def open_source(path: str) -> Source:
    """Returns the model at a folder, hub id (owner/name or owner/name@revision) or .gguf.

    Raises:
        UsageError: nothing usable there.
        UnsupportedError: a format or architecture that jlora does not read.
        CorruptError: files that are damaged or contradict each other.
    """
    location = Path(path)
    if location.is_file():
        return _open_file(location)
    if location.is_dir():
        if (location / "jlora.json").is_file():
            from convert.base import open_base

            return open_base(location)
        return open_hf(location, {"format": "hf", "source": path})
    hub_id = _HUB_ID.fullmatch(path)
    if hub_id is None or location.exists() or path.startswith((".", "~")):
        raise UsageError(
            f"{path}: no such file or folder; give an HF folder, a converted base, "
            "a .gguf file or a hub id (owner/name)"
        )
    return _open_hub(hub_id[1], hub_id[2])


def _open_file(path: Path) -> Source:
    if path.suffix == ".gguf":
        from convert.from_gguf import open_gguf

        return open_gguf(path)
    if path.suffix == ".safetensors":
        raise UsageError(f"{path}: give the folder that holds it and its config.json")
    for pattern, what in _OTHER_WEIGHTS.items():
        if fnmatch.fnmatch(path.name, pattern):
            raise UnsupportedError(f"{path}: {what}")
    raise UsageError(f"{path}: not a model folder nor a .gguf file")


def _open_hub(name: str, revision: str | None) -> Source:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UsageError(
            f"{name}: no such local folder, and hub ids need huggingface_hub: "
            "pip install jlora[hub]"
        ) from error
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer.model"],
            ignore_patterns=["original/*", "consolidated*", "adapter_*", "onnx/*"],
        )
    except Exception as error:  # many classes, of several HTTP libraries
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"{name}: no such local folder, and it cannot be fetched from the hub: "
            f"{reason[0]}"
        ) from error
    snapshot = Path(folder)
    provenance = {"format": "hf", "source": name, "revision": snapshot.name}
    return open_hf(snapshot, provenance)


def open_hf(folder: Path, provenance: dict[str, Any]) -> Source:
    """Returns the model of a Hugging Face folder.

    Raises:
        UsageError: not a model folder.
        UnsupportedError: not a plain Llama in safetensors.
        CorruptError: files that are damaged or contradict each other.
    """
    _require_config(folder)
    hf_config = read_json(folder, "config.json")
    config = parse_config(hf_config, f"{folder}/")
    entries = _find_tensors(folder)
    names = {name.path: name for name in all_names(config)}
    stored = _match(folder, entries, config, list(names.values()))
    _check_dtype(folder, hf_config, {stored[n.key].dtype for n in names.values()})

    def read(path: str) -> np.ndarray:
        name = names[path]
        array = read_tensor(stored[name.key])
        check_values(array, f"{stored[name.key].file}: tensor {name.key!r}")
        return name.to_params(array)

    return Source(
        kind="hf",
        location=folder,
        config=config,
        hf_config=hf_config,
        tensors={
            path: Spec(name.shape, stored[name.key].dtype)
            for path, name in names.items()
        },
        read=read,
        files=read_side_files(folder),
        provenance=provenance,
    )


def _check_dtype(
    folder: Path, hf_config: dict[str, Any], stored: set[np.dtype[Any]]
) -> None:
    """Warns if config.json names a dtype that no tensor has; the tensors are believed."""
    declared = hf_config.get("dtype") or hf_config.get("torch_dtype")
    found = sorted(str(dtype) for dtype in stored)
    if declared is not None and declared not in found:
        _log.warning(
            "%s: config.json says dtype %s, the tensors are %s",
            folder,
            declared,
            ", ".join(found),
        )


def parse_config(hf_config: dict[str, Any], where: str) -> LlamaConfig:
    """Returns the architecture; errors start with `where`, then name the key."""
    try:
        return LlamaConfig.from_hf(hf_config)
    except JloraError as error:
        raise type(error)(f"{where}{error}") from error


def _require_config(folder: Path) -> None:
    if (folder / "config.json").exists():
        return
    if (folder / "params.json").exists():
        raise UnsupportedError(
            f"{folder}: params.json without config.json is "
            f"{_OTHER_WEIGHTS['consolidated*.pth']}"
        )
    if (folder / "adapter_config.json").exists():
        raise UsageError(f"{folder}: {_OTHER_WEIGHTS['adapter_model.safetensors']}")
    if (folder / "checkpoints").is_dir():
        raise UsageError(
            f"{folder}: a run folder, which holds an adapter, not a model; give the base "
            "model here and this folder as the adapter"
        )
    raise UsageError(f"{folder}: holds no config.json, so it is not a model folder")


def read_json(
    folder: Path, name: str, max_bytes: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """Returns a JSON object stored in a model folder.

    Raises:
        CorruptError: missing, too large, or not a JSON object.
    """
    where = f"{folder / name}"
    return parse_json_object(_read_side(folder, name, max_bytes), where, max_bytes)


def read_side_files(folder: Path) -> dict[str, bytes]:
    """Returns the tokenizer, template and generation files of a folder by name."""
    found = (path for pattern in SIDE_FILES for path in sorted(folder.glob(pattern)))
    names = [path.relative_to(folder).as_posix() for path in found]
    return {name: _read_side(folder, name, MAX_SIDE_FILE_BYTES) for name in names}


def _read_side(folder: Path, name: str, max_bytes: int) -> bytes:
    path = _inside(folder, name)
    with reading(path), path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise CorruptError(f"{path}: more than {max_bytes:,} bytes")
    return data


def _inside(folder: Path, name: str) -> Path:
    """Returns the path of a file in `folder`, which no link may lead out of.

    The hub cache is the exception: it links snapshot files to its own blobs.
    """
    path, home = folder / name, folder.resolve()
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(root) for root in roots):
        raise CorruptError(
            f"{path}: a link that leaves the model folder; copy the file into it"
        )
    return path


def _find_tensors(folder: Path) -> dict[str, Entry]:
    """Returns every stored tensor: the index decides, else model.safetensors."""
    if (folder / INDEX).exists():
        return _read_index(folder)
    if (folder / SINGLE).exists():
        return read_header(_inside(folder, SINGLE))
    files = sorted(path.name for path in folder.iterdir())
    if any(_SHARD.fullmatch(name) for name in files):
        raise CorruptError(
            f"{folder}: safetensors shards without {INDEX}; download it as well"
        )
    for pattern, what in _OTHER_WEIGHTS.items():
        found = fnmatch.filter(files, pattern)
        if found:
            raise UnsupportedError(f"{folder}: only {listing(found)} found: {what}")
    raise UsageError(f"{folder}: holds no weights; expected {SINGLE} or {INDEX}")


def _read_index(folder: Path) -> dict[str, Entry]:
    index = read_json(folder, INDEX, MAX_INDEX_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptError(f"{folder / INDEX}: expected a non-empty weight_map")
    refuse_quantised(f"{folder / INDEX}", list(weight_map))
    bad = sorted(
        {repr(name) for name in weight_map.values() if not _is_plain_name(name)}
    )
    if bad:
        raise CorruptError(
            f"{folder / INDEX}: not plain .safetensors file names: {listing(bad)}"
        )
    shards = sorted(set(weight_map.values()))
    problems = []
    missing = sorted({*_gaps(shards), *shards} - set(_existing(folder, shards)))
    if missing:
        problems.append(f"missing files: {listing(missing)}")
    entries: dict[str, Entry] = {}
    for shard in _existing(folder, shards):
        tensors = read_header(_inside(folder, shard))
        twice = [
            f"{key} ({entries[key].file.name} and {shard})"
            for key in tensors
            if key in entries
        ]
        unlisted = sorted(key for key in tensors if key not in weight_map)
        absent = sorted(
            key
            for key, file in weight_map.items()
            if file == shard and key not in tensors
        )
        for text, keys in (
            ("tensors in two shards", twice),
            (f"tensors of {shard} that the index does not name", unlisted),
            (f"tensors the index expects in {shard}", absent),
        ):
            if keys:
                problems.append(f"{text}: {listing(keys)}")
        entries.update(tensors)
    if problems:
        raise CorruptError(
            f"{folder}: {INDEX} and the shards disagree; {'; '.join(problems)}; "
            "download the model again"
        )
    _check_total_size(folder, index, entries)
    return entries


def _is_plain_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not name.startswith(".")
        and not set(name) & set("/\\:\0")
    )


def _existing(folder: Path, names: list[str]) -> list[str]:
    return [name for name in names if (folder / name).exists()]


def _gaps(shards: list[str]) -> set[str]:
    """Returns every name that the numbering of the shards implies."""
    implied = set()
    for match in filter(None, map(_SHARD.fullmatch, shards)):
        stem, total = match[1], match[3]
        # 10,000 is far above any real model; a wild number must not fill the memory.
        for i in range(1, min(int(total), 10_000) + 1):
            implied.add(f"{stem}-{i:05d}-of-{total}.safetensors")
    return implied


def _check_total_size(
    folder: Path, index: dict[str, Any], entries: dict[str, Entry]
) -> None:
    metadata = index.get("metadata")
    declared = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(entry.nbytes for entry in entries.values())
    if declared is not None and declared != total:
        _log.warning(
            "%s: total_size is %s, the tensors take %d bytes",
            folder / INDEX,
            declared,
            total,
        )


def refuse_quantised(where: str, names: list[str]) -> None:
    """Raises UnsupportedError if tensor names belong to a quantised checkpoint."""
    found = sorted(name for name in names if _QUANTISED.fullmatch(name))
    if found:
        raise UnsupportedError(
            f"{where}: a quantised checkpoint ({listing(found, 4)}); use the original "
            "bfloat16, float16 or float32 model"
        )


def _match(
    folder: Path, entries: dict[str, Entry], config: LlamaConfig, names: list[Name]
) -> dict[str, Entry]:
    """Returns the stored tensor of every HF key; all mismatches are raised at once."""
    refuse_quantised(str(folder), list(entries))
    stored = {k: v for k, v in entries.items() if not k.endswith("rotary_emb.inv_freq")}
    if not any(key.startswith("model.") for key in stored):  # saved as a LlamaModel
        stored = {
            key if key.startswith("lm_head.") else f"model.{key}": entry
            for key, entry in stored.items()
        }
    head = stored.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    check_names(
        str(folder),
        {key: entry.shape for key, entry in stored.items()},
        {name.key: name.hf_shape for name in names},
    )
    if head is not None and not _same_bytes(head, stored["model.embed_tokens.weight"]):
        raise CorruptError(
            f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from "
            "model.embed_tokens.weight; if both are meant, set tie_word_embeddings to "
            "false in config.json"
        )
    return stored


def check_names(
    where: str,
    found: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[int, ...]],
) -> None:
    """Compares stored names and shapes with the model's.

    Raises:
        CorruptError: lists all that is missing, unexpected or of another shape.
    """
    missing = [key for key in expected if key not in found]
    unexpected = sorted(key for key in found if key not in expected)
    shapes = [
        f"{key} {list(found[key])} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {listing(missing)}")
        if missing == ["lm_head.weight"]:
            problems[-1] += (
                " (if the output layer is the embedding, set tie_word_embeddings to "
                "true in config.json)"
            )
    if unexpected:
        hint = nearest(unexpected[0], missing)
        problems.append(f"{len(unexpected)} unexpected: {listing(unexpected)}{hint}")
    if shapes:
        problems.append(f"{len(shapes)} of another shape: {listing(shapes)}")
    if problems:
        raise CorruptError(
            f"{where}: the tensors do not fit the configuration: {'; '.join(problems)}"
        )


def _same_bytes(a: Entry, b: Entry, chunk: int = 16 << 20) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return all(
        np.array_equal(
            read_bytes(a.file, a.offset + i, min(chunk, a.nbytes - i)),
            read_bytes(b.file, b.offset + i, min(chunk, a.nbytes - i)),
        )
        for i in range(0, a.nbytes, chunk)
    )


def check_values(array: np.ndarray, where: str) -> None:
    """Raises CorruptError at the first NaN or infinity; warns of an all-zero matrix."""
    index = first_non_finite(array)
    if index is not None:
        raise CorruptError(
            f"{where}: {array[index]} at {list(index)}; the file is damaged, "
            "use another copy"
        )
    if array.ndim == 2 and not array.any():
        _log.warning("%s: every value is zero", where)


def first_non_finite(array: np.ndarray) -> tuple[int, ...] | None:
    """Returns the index of the first NaN or infinity; None if every value is finite."""
    flat = array.reshape(-1)
    step = 1 << 20  # a few MB of temporaries, whatever the tensor's size
    for start in range(0, flat.size, step):
        part = flat[start : start + step]
        if part.dtype == ml_dtypes.bfloat16:  # on its bits: ten times faster
            bad = (part.view(np.uint16) & 0x7F80) == 0x7F80
        else:
            bad = ~np.isfinite(part)
        if bad.any():
            where = np.unravel_index(start + int(bad.argmax()), array.shape)
            return tuple(int(i) for i in where)
    return None


def stored_dtype(spec: Spec, dtype: Dtype) -> np.dtype[Any]:
    """Returns the dtype a tensor gets; "keep" narrows float64, which JAX has not."""
    if dtype != "keep":
        return np.dtype(jnp.dtype(dtype))
    return np.dtype(np.float32) if spec.dtype == np.float64 else spec.dtype


def read_as(source: Source, path: str, dtype: Dtype) -> np.ndarray:
    """Returns one tensor in the dtype asked for; a kernel may be a transposed view.

    Raises:
        CorruptError: a value does not fit the dtype.
    """
    array = source.read(path)
    target = stored_dtype(source.tensors[path], dtype)
    with np.errstate(over="ignore", under="ignore"):
        result = array.astype(target, copy=False)
    if float(ml_dtypes.finfo(target).max) < float(ml_dtypes.finfo(array.dtype).max):
        index = first_non_finite(result)
        if index is not None:
            raise CorruptError(
                f"{source.location}: {path}: {array[index]} at {list(index)} does not "
                f"fit {target}; choose float32 or bfloat16"
            )
    return result


def load_params(
    source: Source, *, dtype: Dtype = "keep", sharding: ShardingOf | None = None
) -> Params:
    """Returns the params as jax arrays, read one tensor at a time.

    Args:
        source: the model.
        dtype: of every leaf; "keep" leaves bfloat16 and float16 bit for bit.
        sharding: (path, shape) -> sharding; each process makes its own slices only.
    """
    params: Params = {}
    for path, spec in source.tensors.items():
        array = read_as(source, path, dtype)
        if sharding is None:
            leaf = jnp.asarray(array)  # XLA transposes a view faster than NumPy
        else:
            leaf = jax.make_array_from_callback(
                spec.shape,
                sharding(path, spec.shape),
                lambda index, array=array: np.array(array[index], order="C"),
            )
        # Copies are asynchronous: without waiting, many tensors would be held twice.
        set_leaf(params, path, leaf.block_until_ready())
    return params


def set_leaf(tree: Params, path: str, leaf: Any) -> None:
    """Puts a leaf at a slash-separated path of a nested dict."""
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = leaf


def load(
    path: str, adapter: str | None = None, dtype: Dtype = "float32"
) -> "tuple[Llama, Params]":
    """Returns the model and its params, ready for `model.apply({"params": params}, tokens)`.

    Args:
        path: HF folder, hub id, .gguf file or converted base.
        adapter: PEFT folder or run folder, or None.
        dtype: of the params and of the computation.
    """
    from jlora.model import Llama

    source = open_source(str(path))
    params = load_params(source, dtype=dtype)
    if adapter is not None:
        from convert.peft import attach_adapter

        params = attach_adapter(params, source.config, adapter)
    compute = jnp.float32 if dtype == "keep" else jnp.dtype(dtype)
    return Llama(source.config, dtype=compute), params
