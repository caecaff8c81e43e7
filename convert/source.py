"""Where a model comes from: an HF folder, a hub id, a GGUF file or a converted base.

`open_source` checks names, shapes and dtypes before a byte of weights is read; a
`Source` then hands out one tensor at a time in jlora's layout.
"""

import contextlib
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from convert.blocks import Index, as_box, empty, transpose_into, whole
from convert.leaves import (
    is_quantizable,
    quantize_tensor,
    quantized_specs,
    resulting_format,
)
from convert.names import Params
from convert.refusals import refuse_other_file
from convert.safetensors import Spec, reading, refuse_other_format
from jlora.config import LlamaConfig
from jlora.errors import (
    CorruptError,
    JloraError,
    UsageError,
    listing,
    nearest,
)
from jlora.quantize import BLOCK, Format
from jlora.strict_json import MAX_JSON_BYTES, parse_json_object

if TYPE_CHECKING:
    from jlora.model import Llama

Dtype = Literal["keep", "float32", "bfloat16", "float16"]
BaseDtype = Dtype | Literal["fp8", "int8", "nf4"]
ShardingOf = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
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
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_log = logging.getLogger(__name__)


class Read(Protocol):
    """Reads one tensor, or a box of it that one process needs."""

    def __call__(self, path: str, box: Index | None = None) -> np.ndarray:
        """Returns the tensor at a params path, checked, in jlora's layout."""
        ...


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
    read: Read
    """(params path, box or None) -> array; a kernel may be a transposed view."""
    files: dict[str, bytes]
    """Tokenizer, template and generation files, verbatim."""
    provenance: dict[str, Any]
    """Where it came from, for jlora.json; free of times."""
    weights: tuple[Path, ...] = ()
    """The files that hold the tensors; none of a base, whose record has their digests."""
    quantize: Format = "none"
    """How the projections' kernels are stored; `read` gives them in float32."""

    def specs(self, path: str, dtype: Dtype, quantize: Format) -> dict[str, Spec]:
        """Returns {params path: spec} of what a tensor becomes in this dtype and format."""
        spec = self.tensors[path]
        if quantize != "none" and is_quantizable(path):
            return quantized_specs(path, spec.shape, quantize)
        return {path: Spec(spec.shape, stored_dtype(spec, dtype))}


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
        from convert.hf_folder import open_hf

        return open_hf(location, {"format": "hf", "source": path})
    if not is_hub_id(path) or location.exists():
        raise UsageError(
            f"{path}: no such file or folder; give an HF folder, a converted base, "
            "a .gguf file or a hub id (owner/name)"
        )
    return _open_hub(path)


def open_config(path: str) -> LlamaConfig:
    """Returns the architecture of a model; of a hub id, only config.json is fetched.

    Raises:
        UsageError, UnsupportedError, CorruptError: as `open_source`.
    """
    if Path(path).exists() or not is_hub_id(path):
        return open_source(path).config
    from convert.hf_folder import read_config

    return read_config(hub_folder(path, ["config.json"]))[1]


def _open_file(path: Path) -> Source:
    if path.suffix == ".gguf":
        from convert.from_gguf import open_gguf

        return open_gguf(path)
    if path.suffix == ".safetensors":
        raise UsageError(f"{path}: give the folder that holds it and its config.json")
    refuse_other_file(path)
    raise UsageError(f"{path}: not a model folder nor a .gguf file")


def _open_hub(name: str) -> Source:
    from convert.hf_folder import open_hf

    snapshot = hub_folder(
        name,
        ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"],
        ["original/*", "consolidated*", "adapter_*", "onnx/*"],
    )
    provenance = {"source": name.partition("@")[0], "revision": snapshot.name}
    return open_hf(snapshot, {"format": "hf", **provenance})


def is_hub_id(path: str) -> bool:
    """Returns whether a path that is not there may be owner/name or owner/name@revision."""
    return _HUB_ID.fullmatch(path) is not None and not path.startswith((".", "~"))


def hub_folder(
    name: str, patterns: list[str], ignored: list[str] | None = None
) -> Path:
    """Returns the local copy of the files of a hub id that match the patterns.

    Raises:
        UsageError: it cannot be fetched.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise UsageError(
            f"{name}: no such local folder, and hub ids need huggingface_hub: "
            "pip install huggingface_hub"
        ) from error
    repository, _, revision = name.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=patterns,
            ignore_patterns=ignored,
        )
    except Exception as error:  # many classes, of several HTTP libraries
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"{name}: no such local folder, and it cannot be fetched from the hub: "
            f"{reason[0]}"
        ) from error
    return Path(folder)


@contextlib.contextmanager
def hashing(source: Source) -> Iterator[Callable[[], dict[str, str]]]:
    """Yields a function that returns {file name: sha256} of the files with weights.

    They are hashed by a thread meanwhile: whoever reads them too finds them in the page
    cache. Model hubs show the same digests.
    """

    def digest(path: Path) -> str:
        with reading(path), path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    pool = ThreadPoolExecutor(1)
    try:
        found = {path.name: pool.submit(digest, path) for path in source.weights}
        yield lambda: {name: future.result() for name, future in found.items()}
    finally:
        pool.shutdown(cancel_futures=True)


def parse_config(hf_config: dict[str, Any], where: str) -> LlamaConfig:
    """Returns the architecture; errors start with `where`, then name the key."""
    try:
        return LlamaConfig.from_hf(hf_config)
    except JloraError as error:
        raise type(error)(f"{where}{error}") from error


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
    path = inside_folder(folder, name)
    with reading(path), path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise CorruptError(f"{path}: more than {max_bytes:,} bytes")
    if path.suffix in (".json", ".model"):
        refuse_other_format(path, data[:64], "text")
    return data


def inside_folder(folder: Path, name: str) -> Path:
    """Returns the path of a file in `folder`, which no link may lead out of.

    The hub cache is the exception: it links snapshot files to its own blobs.
    """
    path, home = folder / name, folder.resolve()
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise CorruptError(f"{path}: not a file")
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(root) for root in roots):
        raise CorruptError(
            f"{path}: a link that leaves the model folder; copy the file into it"
        )
    return path


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
    if is_finite(array):
        return None
    bits = np.dtype(f"u{array.itemsize}")  # np.isfinite warns of some NaNs of bfloat16
    exponent = np.array(np.inf, array.dtype).view(bits)
    bad = (array.view(bits) & exponent) == exponent
    return tuple(int(i) for i in np.unravel_index(int(bad.argmax()), array.shape))


def is_finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; two passes over the bits, no temporaries.

    The bits of all finite values are below those of infinity: read as signed numbers if
    positive, as unsigned ones if negative.
    """
    if not array.size:
        return True
    signed, unsigned = (np.dtype(f"{kind}{array.itemsize}") for kind in "iu")
    infinity, minus_infinity = np.array([np.inf, -np.inf], array.dtype)
    return bool(
        array.view(signed).max() < infinity.view(signed)
        and array.view(unsigned).max() < minus_infinity.view(unsigned)
    )


def stored_dtype(spec: Spec, dtype: Dtype) -> np.dtype[Any]:
    """Returns the dtype a tensor gets; "keep" narrows float64, which JAX has not."""
    if dtype != "keep":
        return np.dtype(jnp.dtype(dtype))
    return np.dtype(np.float32) if spec.dtype == np.float64 else spec.dtype


def size_as(source: Source, dtype: Dtype, quantize: Format = "none") -> int:
    """Returns the bytes that all tensors take in the dtype and format asked for."""
    quantize = resulting_format(source, dtype, quantize)
    return sum(
        spec.nbytes
        for path in source.tensors
        for spec in source.specs(path, dtype, quantize).values()
    )


def read_as(
    source: Source, path: str, dtype: Dtype, box: Index | None = None
) -> np.ndarray:
    """Returns a tensor, or a box of it, in the dtype asked for.

    A kernel may be a transposed view.

    Raises:
        CorruptError: a value does not fit the dtype.
    """
    array = source.read(path, box)
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


def read_leaves(
    source: Source,
    path: str,
    dtype: Dtype,
    quantize: Format,
    boxes: Mapping[str, Index],
) -> dict[str, np.ndarray]:
    """Returns {params path: array} of what `Source.specs` promises, or boxes of it.

    Only to quantise, a kernel is read as a whole.
    """
    if quantize == "none" or not is_quantizable(path):
        return {path: read_as(source, path, dtype, boxes[path])}
    if source.quantize == quantize:
        return {leaf: source.read(leaf, box) for leaf, box in boxes.items()}
    arrays = quantize_tensor(path, source.read(path), quantize)
    return {leaf: array[boxes[leaf]] for leaf, array in arrays.items()}


def load_params(
    source: Source, *, dtype: BaseDtype = "keep", sharding: ShardingOf | None = None
) -> Params:
    """Returns the params as jax arrays, read one tensor at a time.

    Args:
        source: the model.
        dtype: of every leaf; "keep" leaves them bit for bit; fp8, int8 and nf4 quantise
            the projections and keep the others. Another one dequantises.
        sharding: (path, shape) -> sharding; each process reads and makes its own
            slices only.

    Raises:
        UsageError: the model is quantised in another format, or a device's share of a
            tensor would not be whole.
    """
    params: Params = {}
    plain, quantize = _split_dtype(source, dtype)
    wanted = {path: source.specs(path, plain, quantize) for path in source.tensors}
    if sharding is not None:
        _check_shards(wanted, sharding)
    for path, specs in wanted.items():
        places = {
            leaf: None if sharding is None else sharding(leaf, spec.shape)
            for leaf, spec in specs.items()
        }
        boxes = {leaf: _own_box(places[leaf], specs[leaf].shape) for leaf in specs}
        arrays = read_leaves(source, path, plain, quantize, boxes)
        for leaf, spec in specs.items():
            array = _place(arrays.pop(leaf), boxes[leaf], spec.shape, places[leaf])
            # Copies are asynchronous: many tensors would be held twice without waiting.
            set_leaf(params, leaf, array.block_until_ready())
    return params


def _check_shards(
    wanted: Mapping[str, Mapping[str, Spec]], sharding: ShardingOf
) -> None:
    wrong = []
    for specs in wanted.values():
        for leaf, spec in specs.items():
            try:
                sharding(leaf, spec.shape).shard_shape(spec.shape)
            except ValueError:
                wrong.append(f"{leaf} {list(spec.shape)}")
    if wrong:
        raise UsageError(
            f"the mesh does not cut into equal parts: {listing(wrong, 3)}; nf4 keeps "
            f"blocks of {BLOCK} weights together; lower mesh.fsdp or mesh.tensor, or use "
            "int8 or fp8"
        )


def abstract_params(source: Source, *, dtype: BaseDtype = "keep") -> Params:
    """Returns shapes and dtypes as `load_params` would give, without a byte read."""
    params: Params = {}
    plain, quantize = _split_dtype(source, dtype)
    for path in source.tensors:
        for leaf, spec in source.specs(path, plain, quantize).items():
            set_leaf(params, leaf, jax.ShapeDtypeStruct(spec.shape, spec.dtype))
    return params


def _split_dtype(source: Source, dtype: BaseDtype) -> tuple[Dtype, Format]:
    """Returns (dtype of plain leaves, format of the projections)."""
    if dtype in ("fp8", "int8", "nf4"):
        return "keep", resulting_format(source, "keep", dtype)
    return dtype, resulting_format(source, dtype, "none")


def _own_box(sharding: jax.sharding.Sharding | None, shape: tuple[int, ...]) -> Index:
    """Returns the smallest box that holds what this process's devices need."""
    if sharding is None:
        return whole(shape)
    parts = [
        as_box(index, shape)
        for index in sharding.addressable_devices_indices_map(shape).values()
    ]
    return tuple(
        slice(min(part.start for part in axis), max(part.stop for part in axis))
        for axis in zip(*parts, strict=True)
    )


def _place(
    array: np.ndarray,
    box: Index,
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    """Returns the whole array on its devices; `array` holds what lies in `box`."""
    if not array.flags.c_contiguous or array.ctypes.data % 64:
        # JAX on a CPU takes over what is aligned, and copies anything else slowly.
        array = _aligned_copy(array)
    if sharding is None:
        return jax.device_put(array)
    pieces: dict[str, np.ndarray] = {}  # devices that hold copies share one

    def piece(index: tuple[Any, ...] | None) -> np.ndarray:
        own = as_box(index, shape)
        if str(own) not in pieces:
            inside = tuple(
                slice(part.start - outer.start, part.stop - outer.start)
                for part, outer in zip(own, box, strict=True)
            )
            part = array[inside]
            pieces[str(own)] = array if own == box else _aligned_copy(part)
        return pieces[str(own)]

    return jax.make_array_from_callback(shape, sharding, piece)


def _aligned_copy(array: np.ndarray) -> np.ndarray:
    result = empty(array.shape, array.dtype)
    if array.ndim == 2 and array.flags.f_contiguous:
        transpose_into(result, array.T)
    else:
        result[...] = array
    return result


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
        adapter: PEFT folder or run folder, or None. Its dropout acts where a "dropout"
            rng is given, as in PEFT's training mode.
        dtype: of the params and of the computation.
    """
    from jlora.model import Llama

    if dtype not in get_args(Dtype):
        raise UsageError(f"dtype={dtype!r}; expected one of {listing(get_args(Dtype))}")
    source = open_source(str(path))
    config, params = source.config, load_params(source, dtype=dtype)
    dropout = 0.0
    if adapter is not None:
        from convert.peft import attach_adapter, model_config, open_adapter

        opened = open_adapter(adapter)
        params = attach_adapter(params, config, opened)
        config = model_config(opened, config)
        dropout = float(opened.config.lora_dropout)
    compute = jnp.float32 if dtype == "keep" else jnp.dtype(dtype)
    return Llama(config, dtype=compute, lora_dropout=dropout), params
