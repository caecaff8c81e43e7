"""An opened model whose tensors are read one at a time, in jlora's layout.

`jlora.formats.open_model` makes a `ModelSource` of a path; the functions below read
its tensors in the dtype and format that the caller wants.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from jlora.formats.safetensors_file import Spec
from jlora.formats.stored_leaves import (
    is_quantizable,
    quantize_tensor,
    quantized_specs,
)
from jlora.formats.tensor_checks import first_non_finite


@runtime_checkable
class Read(Protocol):
    """Reads one tensor, or a box of it that one process needs."""

    def __call__(self, path: str, box: Index | None = None) -> np.ndarray:
        """Returns the tensor at a params path, checked, in jlora's layout."""
        ...


@dataclass(frozen=True)
class ModelSource:
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


def resulting_format(source: ModelSource, dtype: str, quantize: Format) -> Format:
    """Returns the format that the projections get.

    A quantised model stays as it is, and another dtype than keep dequantises it.

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
    """Returns the bytes that all tensors take in the dtype and format asked for."""
    quantize = resulting_format(source, dtype, quantize)
    return sum(
        spec.nbytes
        for path in source.tensors
        for spec in source.specs(path, dtype, quantize).values()
    )


def read_as(
    source: ModelSource, path: str, dtype: Dtype, box: Index | None = None
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
    source: ModelSource,
    path: str,
    dtype: Dtype,
    quantize: Format,
    boxes: Mapping[str, Index],
) -> dict[str, np.ndarray]:
    """Returns {params path: array} of what `ModelSource.specs` promises, or boxes of it.

    Only to quantise, a kernel is read as a whole.
    """
    if quantize == "none" or not is_quantizable(path):
        return {path: read_as(source, path, dtype, boxes[path])}
    if source.quantize == quantize:
        return {leaf: source.read(leaf, box) for leaf, box in boxes.items()}
    arrays = quantize_tensor(path, source.read(path), quantize)
    return {leaf: array[boxes[leaf]] for leaf, array in arrays.items()}


@contextlib.contextmanager
def hashing(source: ModelSource) -> Iterator[Callable[[], dict[str, str]]]:
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
