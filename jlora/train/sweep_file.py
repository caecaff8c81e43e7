"""The file of a sweep, and what its adapters have to share.

The file gives adapters by name, each with what differs from the command line:

low: {optim.learning_rate: 1e-4}
high: {optim.learning_rate: 3e-4, lora.r: 16, seed: 1}
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import jax

from jlora.cli.arguments import with_changes
from jlora.cli.strict_yaml import read_yaml
from jlora.config.run_config import ComputeConfig
from jlora.data.batch.batches import Dataset
from jlora.errors import UsageError, listing
from jlora.train.optimizer import ELEMENTWISE, check_groups
from jlora.train.resuming import locked
from jlora.train.run import write_settings

# What is data to one compiled step. All else is shared: base, files, batch size, steps.
VARIES = (
    "seed",
    "lora.r",
    "lora.lora_alpha",
    "lora.lora_dropout",
    "lora.use_rslora",
    "lora.rank_pattern",
    "lora.alpha_pattern",
    "lora.init_lora_weights",
    "optim.learning_rate",
    "optim.lr_schedule",
    "optim.warmup_ratio",
    "optim.warmup_steps",
    "optim.min_lr_ratio",
    "optim.decay_ratio",
    "optim.weight_decay",
    "optim.group_weight_decay",
    "optim.max_grad_norm",
    "optim.loraplus_lr_ratio",
    "optim.loraplus_lr_embedding",
)
# Names become folders beside the sweep's own files.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")
_RESERVED = (
    *("adapter", "checkpoints", "config.yaml", "facts.json", "metrics.jsonl"),
    "report.html",
)
A = TypeVar("A", bound=Any)


def read_sweep(args: A) -> dict[str, A]:
    """Returns {adapter: arguments of its own run}; {"": args} without a sweep.

    Args:
        args: of train.py. Each adapter gets them with its changes, its own folder in
            output_dir, and no sweep.

    Raises:
        UsageError: not such a file, a bad name, a setting that cannot vary or be.
    """
    if args.sweep is None:
        return {"": args}
    file = Path(args.sweep)
    if args.optim.optimizer not in ELEMENTWISE:
        raise UsageError(
            f"{file}: optim.optimizer={args.optim.optimizer} looks at whole matrices or at "
            f"blocks of values, which change where a sweep pads ranks; use "
            f"{' or '.join(ELEMENTWISE)}"
        )
    args_of = {
        name: _changed(args, name, changes or {}, file)
        for name, changes in read_yaml(file).items()
    }
    if not args_of:
        raise UsageError(f"{file}: no adapters; expected NAME: {{KEY: VALUE}} lines")
    return args_of


@contextmanager
def sweep_folder(args: Any) -> Iterator[None]:
    """Locks the folder of a sweep, and writes its config.yaml; nothing without a sweep.

    Raises:
        UsageError: as `locked`.
    """
    if args.sweep is None:
        yield
        return
    folder = Path(args.output_dir)
    with locked(folder):
        write_settings(folder, asdict(args))
        yield


def _changed(args: A, name: str, changes: Any, file: Path) -> A:
    """Returns the arguments of the adapter `name`; raises UsageError, see `read_sweep`."""
    where = f"{file}: {name}"
    if not _NAME.fullmatch(name) or name in _RESERVED:
        raise UsageError(
            f"{where!r} is not a name for an adapter's folder; use letters, digits, "
            f"- and _, and not {listing(_RESERVED)}"
        )
    if not isinstance(changes, dict):
        raise UsageError(
            f"{where} is {changes!r}; expected settings such as "
            "{optim.learning_rate: 1e-4}"
        )
    changed = with_changes(args, changes, where)
    fixed = [key for key in _paths(changes) if key not in VARIES]
    if fixed:
        raise UsageError(
            f"{where}: {listing(fixed)} cannot differ between the adapters of a sweep; "
            f"give it on the command line. What can: {listing(VARIES, len(VARIES))}"
        )
    if args.init_adapter and (own := [k for k in _paths(changes) if _is_shape(k)]):
        raise UsageError(
            f"{where}: {listing(own)} comes from init_adapter; leave it out"
        )
    folder = str(Path(args.output_dir) / name)
    return replace(changed, sweep=None, output_dir=folder)


def _is_shape(key: str) -> bool:
    return key.startswith("lora.") and key != "lora.lora_dropout"


def _paths(changes: dict[str, Any]) -> list[str]:
    """Returns the dotted keys of nested or dotted settings; patterns stay whole."""
    found = []
    for key, value in changes.items():
        whole = key in VARIES or not isinstance(value, dict)
        found += [key] if whole else [f"{key}.{inner}" for inner in value]
    return found


def check_members(
    datasets: Sequence[Dataset], trees: Mapping[str, Any], args_of: Mapping[str, Any]
) -> None:
    """Raises UsageError where data in other orders makes other rows or steps.

    Also as `check_same_leaves`, of the adapters' trees by name, and as `check_groups`.
    """
    check_same_leaves(trees)
    for name, tree in trees.items():
        check_groups(args_of[name].optim, tree)
    shapes = {(d.row_length, d.steps_per_epoch) for d in datasets}
    if len(shapes) > 1:
        raise UsageError(
            "the seeds of the sweep hold out other records, which makes rows or epochs "
            f"of different sizes ({listing(sorted(shapes))}); give data.eval instead of "
            "data.eval_fraction, or one seed"
        )


def check_same_leaves(trees: Mapping[str, Any]) -> None:
    """Raises UsageError if the trees, given by the adapters' names, have other leaves."""
    paths = {
        name: {
            jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)
        }
        for name, tree in trees.items()
    }
    first = next(iter(paths))
    for name, own in paths.items():
        if other := sorted(own ^ paths[first]):
            raise UsageError(
                f"the adapters {first} and {name} of the sweep have different leaves "
                f"({listing(other, 2)}): ranks, numbers and initial values may differ, "
                "but pissa and olora have leaves of their own and go with each other only"
            )


def compute_for_adapters(
    compute: ComputeConfig, adapters: int, *, packed: bool
) -> ComputeConfig:
    """Returns the compute settings for this number of adapters; of one, those given.

    Raises:
        UsageError: kernels that do not take several adapters.
    """
    if adapters == 1:
        return compute
    if compute.kernels == "hopper":
        raise UsageError(
            "compute.kernels=hopper does not take several adapters; use auto or xla"
        )
    if packed and compute.attention == "cudnn":
        raise UsageError(
            "compute.attention=cudnn does not take packed rows of several adapters; "
            "use auto or xla, or leave data.packing out"
        )
    attention = "xla" if packed else compute.attention
    return replace(compute, kernels="xla", attention=attention)
