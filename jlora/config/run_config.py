"""The flags of a run in groups: a dataclass each, with defaults, checks and help texts."""

import math
from dataclasses import dataclass, field, fields, replace
from operator import not_
from typing import Literal, TypeVar

from jlora.config.field_types import check_at_least, replaces
from jlora.config.json_fields import MAX_SIZE
from jlora.errors import UsageError, listing

DEFAULT_SEQ_LEN = 512

# How a converted base is stored: all tensors, and the projections of the layers.
Dtype = Literal["keep", "float32", "bfloat16", "float16"]
Format = Literal["none", "fp8", "int8", "nf4"]
# How the weights are held while the model computes.
BaseDtype = Literal["keep", "float32", "bfloat16", "fp8", "int8", "nf4"]


@dataclass(frozen=True)
class ModelConfig:
    """The model to run; the flags that generate.py and evaluate.py share."""

    model: str
    """HF folder, hub id, .gguf file or converted base."""
    adapter: str | None = None
    """Run folder, one of its checkpoints (RUN/checkpoints/30) or PEFT adapter folder."""
    step: int | None = None
    """Step of the run's checkpoint to take; null: its adapter/, or the newest if it went on."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of activations and matmuls; auto: bfloat16 on GPU and TPU, float32 on CPU."""
    base_dtype: BaseDtype = "keep"
    """Dtype of the weights, as --compute.base_dtype of a training."""

    def __post_init__(self) -> None:
        """Raises UsageError for a step of nothing."""
        if self.step is not None and self.adapter is None:
            raise UsageError(
                f"step={self.step} has no effect without an adapter; "
                "give a run's folder as --adapter"
            )


R = TypeVar("R", bound="RowConfig")


@dataclass(frozen=True)
class RowConfig:
    """How records become rows of tokens, in training and in evaluation."""

    format: Literal[
        "auto", "text", "prompt_completion", "messages", "alpaca", "sharegpt"
    ] = "auto"
    """Format of the records; auto: recognised by the keys of the first one."""
    fields: dict[str, str] | None = None
    """Names of the format's columns in the data, such as {prompt: question}."""
    on_bad_row: Literal["fail", "skip"] = field(
        default="fail", metadata=replaces("max_bad_rows", when="fail".__eq__)
    )
    """Rows that cannot be used: fail lists them and stops, skip leaves them out."""
    max_bad_rows: int = 100
    """Stop the run if on_bad_row=skip leaves out more rows than this."""
    cache_dir: str | None = None
    """Folder that keeps token ids between runs; null: $JLORA_CACHE, or ~/.cache/jlora."""
    seq_len: int | None = None
    """Tokens per row; longer records are cut. null: 512, or the model's maximum if less."""
    packing: bool = False
    """Put several records in one row; each sees only itself, and the loss is the same."""
    train_on: Literal["auto", "assistant", "last_assistant", "completion", "all"] = (
        "auto"
    )
    """Tokens to train on; auto: assistant turns, completions, or all tokens of a text."""
    split_turns: bool = False
    """Make a sample of each answer, with the conversation before it; only it is trained on."""

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range."""
        if self.seq_len is not None and self.seq_len < 2:
            raise UsageError(f"data.seq_len={self.seq_len}; expected at least 2 tokens")
        check_at_least("data", self, "max_bad_rows", 0)
        if self.max_bad_rows != RowConfig.max_bad_rows and self.on_bad_row == "fail":
            raise UsageError(
                "data.max_bad_rows has no effect with data.on_bad_row=fail, which stops at "
                "any bad row; give data.on_bad_row=skip, or leave it out"
            )
        if self.split_turns and self.train_on not in ("auto", "assistant"):
            raise UsageError(
                f"data.split_turns trains on each answer, and data.train_on={self.train_on} "
                "says otherwise; leave one of them out"
            )

    @property
    def row_length(self) -> int:
        """Tokens per row."""
        return DEFAULT_SEQ_LEN if self.seq_len is None else self.seq_len

    def sized(self: R, longest: int) -> R:
        """Returns the same with seq_len set, for a model of `longest` positions."""
        if self.seq_len is not None:
            return self
        return replace(self, seq_len=min(DEFAULT_SEQ_LEN, longest))


@dataclass(frozen=True)
class _DataFiles:
    train: list[str] | dict[str, float] | str | None = None
    """File, folder, glob or hub id (owner/name:config/split) to train on, a list of them, or
    {path: passes per epoch}."""
    eval: list[str] | dict[str, float] | str | None = field(
        default=None, metadata=replaces("eval_fraction", when=bool)
    )
    """Held-out records, in the same forms, evaluated every train.eval_every steps; null:
    the validation split of data.train, if it is a folder with one."""
    eval_fraction: float = field(default=0.0, metadata=replaces("eval", when=bool))
    """Share of data.train that is held out for evaluation, instead of data.eval."""


@dataclass(frozen=True)
class DataConfig(RowConfig, _DataFiles):
    """What to train on."""

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range."""
        super().__post_init__()
        if not 0 <= self.eval_fraction < 1:
            raise UsageError(
                f"data.eval_fraction={self.eval_fraction}; expected a number in [0, 1)"
            )
        if self.eval_fraction and self.eval is not None:
            raise UsageError(
                "data.eval and data.eval_fraction are both given; "
                "held-out records come from one of them"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Length of the training, batch size, and when to log, evaluate and save."""

    max_steps: int = field(default=0, metadata=replaces("num_epochs", when=bool))
    """Optimizer steps; 0: num_epochs decides."""
    num_epochs: float = field(default=1.0, metadata=replaces("max_steps"))
    """Passes over the data, unless max_steps is given."""
    batch_size: int = 8
    """Rows per optimizer step, over all devices and accumulation steps."""
    grad_accum_steps: int = 1
    """Parts that each batch is computed in, to save memory; the result is the same."""
    save_every: int = 100
    """Steps between checkpoints; 0 saves at the end only."""
    eval_every: int = field(
        default=0, metadata=replaces("early_stopping_patience", "keep_best", when=not_)
    )
    """Steps between evaluations on data.eval; 0 evaluates at the end only."""
    eval_at_start: bool = True
    """Also evaluate before the first step, if there is held-out data."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl; their loss is the mean of the steps between."""
    keep: int = 2
    """Checkpoints to keep, the newest."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest eval_loss, and write that one as adapter/."""
    early_stopping_patience: int = 0
    """End the run after so many evaluations without a lower eval_loss; 0: never. A sweep ends
    when that is so of every adapter."""

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range."""
        for name in ("max_steps", "save_every", "eval_every"):
            check_at_least("train", self, name, 0)
        check_at_least("train", self, "early_stopping_patience", 0)
        for name in ("early_stopping_patience", "keep_best"):
            if getattr(self, name) and not self.eval_every:
                raise UsageError(
                    f"train.{name} has no effect without train.eval_every, as there is one "
                    "evaluation at the end; give both, or leave it out"
                )
        for name in ("batch_size", "grad_accum_steps", "log_every", "keep"):
            check_at_least("train", self, name, 1)
        if self.max_steps and self.num_epochs != TrainConfig.num_epochs:
            raise UsageError(
                f"train.num_epochs={self.num_epochs} has no effect with train.max_steps="
                f"{self.max_steps}, which ends the run; leave one of them out"
            )
        if not 0 < self.num_epochs < MAX_SIZE:
            raise UsageError(
                f"train.num_epochs={self.num_epochs}; expected a number above 0"
            )
        if self.batch_size % self.grad_accum_steps:
            raise UsageError(
                f"train.batch_size={self.batch_size} is not a multiple of "
                f"train.grad_accum_steps={self.grad_accum_steps}"
            )

    def total_steps(self, steps_per_epoch: int) -> int:
        """Returns the optimizer steps of the whole run."""
        return self.max_steps or math.ceil(self.num_epochs * steps_per_epoch)

    def check_evaluation(self, *, has_data: bool) -> None:
        """Raises UsageError for a setting that has no effect without held-out data."""
        if self.eval_every and not has_data:
            raise UsageError(
                "train.eval_every has no effect without held-out data; give data.eval or "
                "data.eval_fraction, or leave it out"
            )


_SIZE = replaces("auto")


@dataclass(frozen=True)
class MeshSizes:
    """Devices along each mesh axis; one may be 0, which takes all remaining devices."""

    data: int = field(default=0, metadata=_SIZE)
    """Devices that split the batch and copy the weights."""
    fsdp: int = field(default=1, metadata=_SIZE)
    """Devices that split the batch and the weights."""
    tensor: int = field(default=1, metadata=_SIZE)
    """Devices that split the heads and the MLP."""
    context: int = field(default=1, metadata=_SIZE)
    """Devices that split the tokens of each row, for long rows; weights are copied."""

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range."""
        for item in fields(MeshSizes):
            check_at_least("mesh", self, item.name, 0)


@dataclass(frozen=True)
class MeshConfig(MeshSizes):
    """Devices along each mesh axis; one may be 0, which takes all remaining devices."""

    auto: bool = field(
        default=False,
        metadata=replaces(*(item.name for item in fields(MeshSizes)), when=bool),
    )
    """Take the sizes with which a step fits and is expected to be fastest, over all devices;
    also written --mesh auto."""

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range."""
        super().__post_init__()
        own = [
            f"mesh.{item.name}"
            for item in fields(MeshSizes)
            if getattr(self, item.name) != item.default
        ]
        if self.auto and own:
            raise UsageError(
                f"mesh.auto chooses all sizes, and {listing(own)} is given; leave one out"
            )


@dataclass(frozen=True)
class OneDeviceConfig(MeshSizes):
    """Devices along each mesh axis; one may be 0, which takes all remaining devices."""

    data: int = 1
    """Devices that split the rows and copy the weights."""


@dataclass(frozen=True)
class TensorConfig:
    """Devices that split the weights, for a model that one does not hold."""

    tensor: int = 1
    """Devices that split the heads and the MLP."""

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range."""
        check_at_least("mesh", self, "tensor", 1)


@dataclass(frozen=True)
class ComputeConfig:
    """Number formats, and implementations of the layers."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of activations and matmuls; auto: bfloat16 on GPU and TPU, float32 on CPU."""
    base_dtype: BaseDtype = "keep"
    """Dtype of the frozen weights; keep: as in the checkpoint; fp8, int8, nf4: quantises the
    seven projections of each layer while they are read."""
    remat: Literal["auto", "none", "minimal", "full", "offload"] = "auto"
    """What the backward pass recomputes: none, minimal (norms, rotary, SwiGLU), full (layers),
    offload (layers, their inputs on the host); auto: the first that fits."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Attention kernel; auto: in bfloat16 splash on TPU, and cudnn on GPU where it is
    supported; else xla."""
    kernels: Literal["auto", "xla", "hopper"] = "auto"
    """Matmul kernels of the layers; auto: hopper on H100 and H200 in bfloat16, but not where
    mesh.tensor splits layers with biases or DoRA; else xla."""


def check_seed(seed: int) -> None:
    """Raises UsageError unless both JAX and NumPy accept the seed."""
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed={seed}; expected an integer from 0 to 2^32 - 1")


def check_device(device: str | None, *, is_plan: bool) -> None:
    """Raises UsageError for a device that is named without a plan."""
    if device is not None and not is_plan:
        raise UsageError(
            f"device={device} has no effect without --plan: a run takes the devices of "
            "its host; add --plan, or leave it out"
        )
