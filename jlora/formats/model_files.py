"""Reads the small files of a model folder, such as config.json and tokenizer.json.

Their size is limited, and no link is followed out of the folder.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jlora.config.strict_json import MAX_JSON_BYTES, parse_json_object
from jlora.errors import CorruptError, UsageError
from jlora.formats.refusals import refuse_other_format

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


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError of the body, which opens or reads `path`, into a JloraError.

    Raises:
        CorruptError: the file does not exist, or cannot be read.
        UsageError: no permission, or a folder.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise CorruptError(f"{path}: no such file") from error
    except (PermissionError, IsADirectoryError) as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except OSError as error:
        raise CorruptError(f"{path}: cannot be read ({error.strerror})") from error


def read_json(
    folder: Path, name: str, max_bytes: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """Returns the JSON object in a file of a model folder.

    Raises:
        CorruptError: missing, too large, or not a JSON object.
    """
    where = f"{folder / name}"
    return parse_json_object(read_file(folder, name, max_bytes), where, max_bytes)


def read_side_files(folder: Path) -> dict[str, bytes]:
    """Returns {name: bytes} of the tokenizer, template and generation files of a folder."""
    found = (path for pattern in SIDE_FILES for path in sorted(folder.glob(pattern)))
    names = [path.relative_to(folder).as_posix() for path in found]
    return {name: read_file(folder, name) for name in names}


def read_file(folder: Path, name: str, max_bytes: int = MAX_SIDE_FILE_BYTES) -> bytes:
    """Returns the bytes of a small file in a model folder.

    Raises:
        CorruptError: missing, too large, not a file, or a link out of the folder.
    """
    path = inside_folder(folder, name)
    with reading(path), path.open("rb") as file:
        # Python allocates as much as it is asked to read.
        data = file.read(min(max_bytes, os.fstat(file.fileno()).st_size) + 1)
    if len(data) > max_bytes:
        raise CorruptError(f"{path}: more than {max_bytes:,} bytes")
    if path.suffix in (".json", ".model"):
        refuse_other_format(path, data[:64], "text")
    return data


def inside_folder(folder: Path, name: str) -> Path:
    """Returns the path of a file in `folder`, unless it is a link out of the folder.

    The hub cache is an exception, as its snapshots are links to blobs beside them.

    Raises:
        CorruptError: such a link, or not a file.
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
