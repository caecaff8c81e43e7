"""An opened model whose tensors are read one at a time, in jlora's layout.

`jlora.formats.open_model` makes a `ModelSource` of a path; the functions below read
its tensors in the dtype and format that the caller wants.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jlora.config.llama_config import LlamaConfig
from jlora.config.run_config import Dtype, Format
from jlora.errors import CorruptError, JloraError, UsageError
from jlora.formats.array_blocks import Index
from jlora.formats.model_files import reading
from jlora.formats.quantized_kernels import (
    is_quantizable,
    quantize_tensor,
    quantized_specs,
)
from jlora.formats.safetensors_file import Spec
from jlora.formats.tensor_checks import first_non_finite


@runtime_checkable
class Read(Protocol):
    """A function that reads a tensor, or the box of it that one process needs."""

    def __call__(self, path: str, box: Index | None = None) -> np.ndarray:
        """Returns the checked tensor at a params path, in jlora's layout."""
        ...


@dataclass(frozen=True)
class ModelSource:
    """A model whose configuration and tensor names were checked; weights are not read yet."""

    kind: Literal["hf", "gguf", "base"]
    location: Path
    config: LlamaConfig
    hf_config: dict[str, Any]
    """config.json, unchanged."""
    tensors: dict[str, Spec]
    """Params path -> shape and stored dtype, in HF's order."""
    read: Read
    """(params path, box or None) -> array; a kernel may be a transposed view."""
    files: dict[str, bytes]
    """Tokenizer, template and generation files, byte for byte."""
    provenance: dict[str, Any]
    """Where the model came from, for jlora.json. It has no dates, which would differ."""
    weights: tuple[Path, ...] = ()
    """The files that hold the tensors. Empty for a base, whose record has their digests."""
    quantize: Format = "none"
    """How the kernels of the projections are stored; `read` dequantises them to float32."""
    held: Mapping[str, Format] = field(default_factory=dict)
    """Params path -> format of each kernel whose codes and scales `read` returns, too, by
    their own paths. Other kernels of a quantised model are plain, and stay so."""

    def specs(self, path: str, dtype: Dtype, quantize: Format) -> dict[str, Spec]:
        """Returns {params path: spec} of the leaves that a tensor becomes.

        One leaf of this dtype; for a kernel that is quantised, its codes and scales.
        """
        spec = self.tensors[path]
        if self.becomes_quantized(path, quantize):
            return quantized_specs(path, spec.shape, quantize)
        return {path: Spec(spec.shape, stored_dtype(spec, dtype))}

    def becomes_quantized(self, path: str, quantize: Format) -> bool:
        """Returns whether a tensor is quantised in a model of this format."""
        if quantize == "none" or quantize != self.quantize:
            return quantize != "none" and is_quantizable(path)
        return path in self.held


def parse_config(hf_config: dict[str, Any], where: str) -> LlamaConfig:
    """Returns the architecture that a config.json describes.

    Args:
        hf_config: the contents of config.json.
        where: how error messages begin.
    """
    try:
        return LlamaConfig.from_hf(hf_config)
    except JloraError as error:
        raise type(error)(f"{where}{error}") from error


def stored_dtype(spec: Spec, dtype: Dtype) -> np.dtype[Any]:
    """Returns the dtype that a tensor is loaded or stored in.

    "keep" means the dtype of the file, except that float64 becomes float32, as JAX has
    no float64.
    """
    if dtype != "keep":
        return np.dtype(jnp.dtype(dtype))
    return np.dtype(np.float32) if spec.dtype == np.float64 else spec.dtype


def resulting_format(source: ModelSource, dtype: str, quantize: Format) -> Format:
    """Returns the format that the kernels of the projections are loaded or stored in.

    With quantize "none", dtype "keep" leaves a quantised model as it is, and any other
    dtype dequantises it.

    Raises:
        UsageError: the model is quantised in another format.
    """
    if quantize == "none":
        return source.quantize if dtype == "keep" else "none"
    if source.quantize not in ("none", quantize):
        raise UsageError(
            f"{source.location}: quantised as {source.quantize} already, and cannot "
            f"become {quantize}; convert the original model"
        )
    return quantize


def size_as(source: ModelSource, dtype: Dtype, quantize: Format = "none") -> int:
    """Returns the size of all tensors in bytes, in this dtype and format."""
    quantize = resulting_format(source, dtype, quantize)
    return sum(
        spec.nbytes
        for path in source.tensors
        for spec in source.specs(path, dtype, quantize).values()
    )


def read_as(
    source: ModelSource, path: str, dtype: Dtype, box: Index | None = None
) -> np.ndarray:
    """Returns a tensor, or a box of it, in this dtype. It may be a transposed view.

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
    source: ModelSource,
    path: str,
    dtype: Dtype,
    quantize: Format,
    boxes: Mapping[str, Index],
) -> dict[str, np.ndarray]:
    """Returns {params path: array} of the leaves that a tensor becomes, or boxes of them.

    A box needs only its own part of the file, unless the kernel is quantised here.
    """
    if not source.becomes_quantized(path, quantize):
        return {path: read_as(source, path, dtype, boxes[path])}
    if source.held.get(path) == quantize:
        return {leaf: source.read(leaf, box) for leaf, box in boxes.items()}
    arrays = quantize_tensor(path, source.read(path), quantize)
    return {leaf: array[boxes[leaf]] for leaf, array in arrays.items()}


@contextlib.contextmanager
def hash_weights(source: ModelSource) -> Iterator[Callable[[], dict[str, str]]]:
    """Hashes the files with weights in a thread; yields a function that waits for it.

    The function returns {file name: sha256}, the digests that model hubs show. Reading
    the weights at the same time costs little, as the files are then in the page cache.
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
