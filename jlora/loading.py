"""Loads a model from Python: `jlora.load`, and the adapters of PEFT folders and runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jlora.cli.strict_yaml import read_yaml
from jlora.config.llama_config import LlamaConfig
from jlora.config.run_config import MeshConfig, ModelConfig
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import UsageError, listing
from jlora.formats.load_params import (
    BASE_DTYPES,
    BaseDtype,
    abstract_params,
    load_params,
)
from jlora.formats.model_source import Dtype, ModelSource
from jlora.formats.open_model import open_model
from jlora.formats.peft.adapter import Adapter
from jlora.formats.peft.adapter_placement import adapted_config
from jlora.formats.peft.adapter_reader import find_adapter, read_adapter
from jlora.formats.peft.adapter_writer import adapter_of
from jlora.formats.peft.attach_adapter import attach_adapter
from jlora.formats.peft.named_base import name_for_peft
from jlora.lora.adapter_tree import Params, join
from jlora.lora.initialisation import add_lora, needs_residual_base
from jlora.model.decoding.decoding_weights import decoding_weights
from jlora.model.llama import Llama
from jlora.ops.compute_choices import (
    choose_attention,
    choose_dtype,
    default_platform,
)
from jlora.parallel.sharding import (
    check_divisible,
    make_mesh,
    parameter_sharding,
    tree_shardings,
)
from jlora.train.checkpoint import adapter_of_step, saved_steps
from jlora.train.resuming import is_newest_export


@dataclass
class Base:
    """A model without an adapter; `load` reads its weights when they are needed.

    Attributes:
        path: as the user gave it.
        source: the opened model.
        dtype: of the weights; see `load_params`.
        params: once they are loaded.
        mesh: where they are; None: on the first device.
    """

    path: str
    source: ModelSource
    dtype: BaseDtype
    params: Params | None = None
    mesh: Mesh | None = None

    @classmethod
    def open(cls, path: str, dtype: BaseDtype) -> "Base":
        """Opens a model; raises as `open_model`."""
        return cls(path, open_model(path), dtype)

    def shapes(self) -> Params:
        """Returns the shapes and dtypes of the params; reads nothing."""
        return abstract_params(self.source, dtype=self.dtype)

    def load(self, mesh: Mesh | None) -> Params:
        """Returns the params on the devices of a mesh; they are read once."""
        params = self.params
        if params is None:
            params = load_params(
                self.source,
                dtype=self.dtype,
                sharding=None
                if mesh is None
                else lambda path, _: parameter_sharding(mesh, tuple(path.split("/"))),
            )
        elif mesh is not None and mesh != self.mesh:
            params = jax.device_put(params, tree_shardings(mesh, params))
        self.params, self.mesh = params, mesh
        return params

    def adapted(self, adapter: Adapter) -> tuple[Params, LlamaConfig]:
        """Returns the loaded params with an adapter, and the configuration of both."""
        assert self.params is not None
        params = attach_adapter(self.params, self.source.config, adapter)
        if self.mesh is not None:
            params = jax.device_put(params, tree_shardings(self.mesh, params))
        return params, adapted_config(adapter, self.source.config)

    def tokenizer(self) -> Tokenizer | None:
        """Returns the model's tokenizer; None if it has no tokenizer.json."""
        if "tokenizer.json" not in self.source.files:
            return None
        return Tokenizer(self.source.files, self.source.config)


class _Triple(NamedTuple):
    model: Llama
    params: Params
    tokenizer: Tokenizer | None


L = TypeVar("L", bound="Loaded")


class Loaded(_Triple):
    """(model, params, tokenizer), with the `base` that `jlora.fit` trains on."""

    base: Base

    @classmethod
    def of(cls: type[L], model: Llama, params: Params, base: Base) -> L:
        """Returns a model that was made of this base."""
        loaded = cls(model, params, base.tokenizer())
        loaded.base = base
        return loaded

    def __repr__(self) -> str:
        # Not the arrays, which a notebook would show.
        return f"<{type(self).__name__} of {self.base.path}>"


def load(
    path: str | Path,
    adapter: str | Path | None = None,
    dtype: Dtype = "float32",
    *,
    base_dtype: BaseDtype | None = None,
    mesh: Mesh | None = None,
) -> Loaded:
    """Returns a model, its params and its tokenizer.

        model, params, tokenizer = jlora.load("base", adapter="run")
        logits = model.apply({"params": params}, tokens)

    Args:
        path: HF folder, hub id, .gguf file or converted base.
        adapter: PEFT folder, hub id or run folder. Its dropout is active where a
            "dropout" rng is given, as in PEFT's training mode.
        dtype: of the params and of the computation; keep: params as stored, computation
            in float32.
        base_dtype: of the params, if not `dtype`; fp8, int8 and nf4 quantise the layers'
            projections.
        mesh: spreads the params over its devices, by the rules of training.

    Returns:
        Three values; `jlora.fit` also takes them together. The tokenizer is None if the
        model has no tokenizer.json.

    Raises:
        UsageError, UnsupportedError, CorruptError: as `open_model` and `open_adapter`.
    """
    for name, value, known in (
        ("dtype", dtype, get_args(Dtype)),
        ("base_dtype", base_dtype, (None, *BASE_DTYPES)),
    ):
        if value not in known:
            raise UsageError(f"{name}={value!r}; expected one of {listing(known)}")
    base = Base.open(str(path), dtype if base_dtype is None else base_dtype)
    opened = None if adapter is None else open_adapter(adapter)
    params, config, dropout = base.load(mesh), base.source.config, 0.0
    if opened is not None:
        params, config = base.adapted(opened)
        dropout = float(opened.config.lora_dropout)
    compute = jnp.float32 if dtype == "keep" else jnp.dtype(dtype)
    return Loaded.of(Llama(config, dtype=compute, lora_dropout=dropout), params, base)


class TextModel(NamedTuple):
    """A model that is ready to generate text."""

    model: Llama
    params: Params
    tokenizer: Tokenizer


def load_for_text(args: ModelConfig, *, tensor: int = 1) -> TextModel:
    """Returns the model that the flags name, its adapter merged where that is possible.

    Args:
        args: the flags.
        tensor: devices that split the weights.

    Raises:
        UsageError: there are fewer devices, or they do not divide the model.
        UsageError, UnsupportedError, CorruptError: as `open_model` and `open_adapter`.
    """
    base, mesh = Base.open(args.model, args.base_dtype), None
    adapter = None if args.adapter is None else open_adapter(args.adapter, args.step)
    config = base.source.config
    if tensor > 1:
        mesh = make_mesh(MeshConfig(data=1, tensor=tensor))
        own = config if adapter is None else adapted_config(adapter, config)
        check_divisible(mesh, own, 1)
    params = base.load(mesh)
    if adapter is not None:
        params, config = base.adapted(adapter)
        params = decoding_weights(params)
    if mesh is not None:
        params = jax.device_put(params, tree_shardings(mesh, params))
    model = model_for_text(config, args.dtype, mesh)
    return TextModel(model, params, Tokenizer(base.source.files, config))


def model_for_text(config: LlamaConfig, dtype: str, mesh: Mesh | None = None) -> Llama:
    """Returns the model that generates on these devices; dtype: of `ComputeConfig`.

    On a mesh the compiler partitions it, which it cannot do to a TPU's kernel of attention.
    """
    platform = default_platform()
    chosen = choose_dtype(dtype, platform)
    attention = choose_attention(
        "auto", platform=platform, dtype=chosen, head_dim=config.head_dim
    )
    if attention == "splash" and mesh is not None and mesh.size > 1:
        attention = "xla"
    return Llama(config, chosen, attention)


def exported_adapter(folder: str | Path) -> Path | None:
    """Returns the PEFT folder that `open_adapter` reads; see `find_adapter`.

    None for a run without one, or whose newest checkpoint is not what it holds.
    """
    found, run = find_adapter(folder), Path(folder)
    if found != run / "adapter" or not saved_steps(run / "checkpoints"):
        return found
    return found if is_newest_export(run) else None


def open_adapter(folder: str | Path, step: int | None = None) -> Adapter:
    """Returns the adapter of a PEFT folder or hub id, or of a run's checkpoint.

    Args:
        folder: RUN/checkpoints/30 is a step of a run. Of a run's own folder its adapter/ is
            read, or the newest checkpoint if the run went on after that.
        step: of the run's checkpoint to read instead.

    Raises:
        UsageError: neither an adapter nor a run, or it has no such step.
        UnsupportedError, CorruptError: as `read_adapter`.
    """
    run = run_of(folder)
    if run != Path(folder):
        own = int(Path(folder).name)
        if step not in (None, own):
            raise UsageError(
                f"{folder} and step={step} name two steps; give one of them"
            )
        step = own
    if step is None:
        found = exported_adapter(folder)
        if found is not None:
            return read_adapter(found)
    elif not (run / "checkpoints").is_dir():
        raise UsageError(f"{run}: holds no checkpoints, so step={step} has no effect")
    config, tree, meta = adapter_of_step(run / "checkpoints", step)
    settings = meta["settings"]
    if needs_residual_base(config):  # the initial value is not in the checkpoint
        base = load_params(
            open_model(settings["model"]), dtype=settings["compute"]["base_dtype"]
        )
        tree = join(tree, add_lora(base, config, jax.random.key(settings["seed"])))
    name = config.base_model_name_or_path or _name_for_peft(settings["model"])
    return adapter_of(tree, config, Path(folder), name)


def run_of(folder: str | Path) -> Path:
    """Returns the run of RUN/checkpoints/STEP, and any other path as it is."""
    path = Path(folder)
    is_step = path.parent.name == "checkpoints" and path.name in map(
        str, saved_steps(path.parent)
    )
    return path.parent.parent if is_step else path


def base_model_of(adapter: str) -> str:
    """Returns the model that a run was trained on, or that a PEFT adapter names.

    Raises:
        UsageError: it names none.
    """
    folder = Path(adapter)
    for run in (run_of(folder), folder.parent):
        if (run / "config.yaml").is_file() and (run / "checkpoints").is_dir():
            return str(read_yaml(run / "config.yaml").get("model"))
    name = open_adapter(adapter).config.base_model_name_or_path
    if not name:
        raise UsageError(f"{adapter}: does not say for which model it is; give --model")
    return name


def _name_for_peft(model: str) -> str | None:
    if not Path(model).exists():  # a hub id, or moved since the run
        return model
    return name_for_peft(open_model(model), model)
