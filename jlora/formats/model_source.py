"""Where a model comes from: an HF folder, a hub id, a GGUF file or a converted base.

`open_source` checks names, shapes and dtypes before a byte of weights is read; a
`Source` then hands out one tensor at a time in jlora's layout.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jlora.config.llama_config import LlamaConfig
from jlora.errors import CorruptError, JloraError, UsageError
from jlora.formats.array_blocks import Index
from jlora.formats.hub import hub_folder, is_hub_id
from jlora.formats.model_files import reading
from jlora.formats.refusals import refuse_other_file
from jlora.formats.safetensors_file import Spec
from jlora.formats.stored_leaves import (
    is_quantizable,
    quantize_tensor,
    quantized_specs,
    resulting_format,
)
from jlora.formats.tensor_checks import first_non_finite
from jlora.ops.quantize import Format

Dtype = Literal["keep", "float32", "bfloat16", "float16"]


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
            from jlora.formats.base.base_folder import open_base

            return open_base(location)
        from jlora.formats.hf.hf_folder import open_hf

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
    from jlora.formats.hf.hf_folder import read_config

    return read_config(hub_folder(path, ["config.json"]))[1]


def _open_file(path: Path) -> Source:
    if path.suffix == ".gguf":
        from jlora.formats.gguf.gguf_model import open_gguf

        return open_gguf(path)
    if path.suffix == ".safetensors":
        raise UsageError(f"{path}: give the folder that holds it and its config.json")
    refuse_other_file(path)
    raise UsageError(f"{path}: not a model folder nor a .gguf file")


def _open_hub(name: str) -> Source:
    from jlora.formats.hf.hf_folder import open_hf

    snapshot = hub_folder(
        name,
        ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"],
        ["original/*", "consolidated*", "adapter_*", "onnx/*"],
    )
    provenance = {"source": name.partition("@")[0], "revision": snapshot.name}
    return open_hf(snapshot, {"format": "hf", **provenance})


def parse_config(hf_config: dict[str, Any], where: str) -> LlamaConfig:
    """Returns the architecture; errors start with `where`, then name the key."""
    try:
        return LlamaConfig.from_hf(hf_config)
    except JloraError as error:
        raise type(error)(f"{where}{error}") from error


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
