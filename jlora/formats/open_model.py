"""Opens a model by its path, whatever its format."""

from pathlib import Path

from jlora.config.llama_config import LlamaConfig
from jlora.errors import UsageError
from jlora.formats.base.base_reader import open_base
from jlora.formats.gguf.gguf_model import open_gguf
from jlora.formats.hf.hf_folder import open_hf, read_config
from jlora.formats.model_source import ModelSource
from jlora.formats.refusals import refuse_other_file
from jlora.hub import hub_folder, is_hub_id, nothing_there


def open_model(path: str) -> ModelSource:
    """Opens an HF folder, a converted base, a .gguf file or a hub id; reads no weights.

    Names, shapes and dtypes of all tensors are checked against the configuration. A hub
    id is owner/name or owner/name@revision, and is downloaded.

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
            return open_base(location)
        return open_hf(location, {"format": "hf", "source": path})
    if is_hub_id(path):
        return _open_hub(path)
    raise nothing_there(path, "an HF folder, a converted base, a .gguf file")


def open_config(path: str) -> LlamaConfig:
    """Returns the architecture of a model; of a hub id, only config.json is fetched.

    Raises:
        UsageError, UnsupportedError, CorruptError: as `open_model`.
    """
    if is_hub_id(path):
        return read_config(hub_folder(path, ["config.json"]))[1]
    return open_model(path).config


def _open_file(path: Path) -> ModelSource:
    if path.suffix == ".gguf":
        return open_gguf(path)
    if path.suffix == ".safetensors":
        raise UsageError(f"{path}: give the folder that holds it and its config.json")
    refuse_other_file(path)
    raise UsageError(f"{path}: not a model folder nor a .gguf file")


def _open_hub(name: str) -> ModelSource:
    snapshot = hub_folder(
        name,
        ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"],
        ["original/*", "consolidated*", "adapter_*", "onnx/*"],
    )
    provenance = {"source": name.partition("@")[0], "revision": snapshot.name}
    return open_hf(snapshot, {"format": "hf", **provenance})
