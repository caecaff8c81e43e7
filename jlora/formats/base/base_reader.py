"""Opens a converted base: every byte that is read is compared with its checksum."""

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jlora.config.strict_json import parse_json_object
from jlora.errors import CorruptError, listing
from jlora.formats.array_blocks import Index, read_box, whole
from jlora.formats.base.base_record import (
    RECORD,
    Record,
    StoredTensor,
    check_files,
    file_digests,
    part_of,
    read_record,
)
from jlora.formats.model_files import inside_folder, read_file, read_side_files
from jlora.formats.model_source import ModelSource, parse_config
from jlora.formats.quantized_kernels import (
    dequantize_tensor,
    is_quantizable,
    quantized_specs,
)
from jlora.formats.safetensors_file import Entry, Spec, read_header
from jlora.formats.tensor_checks import check_names
from jlora.formats.tensor_names import all_names


def open_base(folder: Path) -> ModelSource:
    """Returns the model of a converted base; weights are verified as they are read.

    Raises:
        UnsupportedError: written by another version of jlora.
        CorruptError: a missing, added, changed or damaged file.
    """
    record = read_record(folder)
    files = {"config.json": read_file(folder, "config.json"), **read_side_files(folder)}
    check_files(folder, record.files, file_digests(files))
    hf_config = parse_json_object(files.pop("config.json"), f"{folder}/config.json")
    config = parse_config(hf_config, f"{folder}/")
    tensors: dict[str, Spec] = {}
    leaves: dict[str, dict[str, Spec]] = {}
    for name in all_names(config):
        path = name.path
        if _is_quantised(record, path):
            tensors[path] = Spec(name.shape, record.kernel_dtype)
            leaves[path] = quantized_specs(path, name.shape, record.quantize)
        else:
            stored = record.tensors.get(path, Spec(name.shape, record.kernel_dtype))
            tensors[path] = Spec(name.shape, stored.dtype)
            leaves[path] = {path: tensors[path]}
    expected = {leaf: spec for specs in leaves.values() for leaf, spec in specs.items()}
    _check_specs(f"{folder / RECORD}", record.tensors, expected)
    entries: dict[str, Entry] = {}
    parts = {f"{part}.safetensors" for part in map(part_of, tensors)}
    if added := _visible(folder / "params") - parts:
        raise CorruptError(
            f"{folder / 'params'}: {listing(sorted(added))} was added; a base is only "
            "what was converted; move it away"
        )
    for part in sorted(parts):
        path = inside_folder(folder, f"params/{part}")
        entries |= read_header(path, quantised=True)
    _check_specs(f"{folder / 'params'}", entries, expected)

    def read(path: str, box: Index | None = None) -> np.ndarray:
        if path not in entries:  # a quantised kernel
            arrays = {leaf: read(leaf) for leaf in leaves[path]}
            kernel = dequantize_tensor(arrays, tensors[path].shape)
            return kernel if box is None else kernel[box]
        box = whole(expected[path].shape) if box is None else box
        return read_verified(entries[path], record.tensors[path], path, box)

    return ModelSource(
        kind="base",
        location=folder,
        config=config,
        hf_config=hf_config,
        tensors=tensors,
        read=read,
        files=files,
        provenance=record.provenance,
        quantize=record.quantize,
        held={path: record.quantize for path in tensors if path not in leaves[path]},
    )


def _is_quantised(record: Record, path: str) -> bool:
    """Returns whether a base has codes and scales of a kernel; it may have a plain one."""
    is_candidate = record.quantize != "none" and is_quantizable(path)
    return is_candidate and path not in record.tensors


def _visible(folder: Path) -> set[str]:
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return {name for name in names if not name.startswith(".")}


def _check_specs(
    where: str, found: Mapping[str, Spec], expected: Mapping[str, Spec]
) -> None:
    """Raises CorruptError if names, shapes or dtypes are not the model's."""
    shapes = ({k: x.shape for k, x in specs.items()} for specs in (found, expected))
    check_names(where, *shapes)
    wrong = [
        f"{path} {found[path].dtype} instead of {spec.dtype}"
        for path, spec in expected.items()
        if found[path].dtype != spec.dtype
    ]
    if wrong:
        raise CorruptError(f"{where}: other dtypes: {listing(wrong)}")


def read_verified(
    entry: Entry, stored: StoredTensor, path: str, box: Index
) -> np.ndarray:
    """Returns a box of a tensor; each block of rows that it touches is read once.

    Raises:
        CorruptError: a block is cut, or not what was written.
    """

    def check(block: np.ndarray, first: int) -> None:
        if zlib.crc32(block.view(np.uint8).data) != stored.crc32[first // rows]:
            raise CorruptError(
                f"{entry.file}: {path} is damaged (rows {first} to "
                f"{first + len(block) - 1} differ from what was written); convert the "
                "model again"
            )

    rows = stored.block_rows
    return read_box(entry, box, check=check, block_rows=rows)
