"""Fine-tune a Llama with LoRA: model and data in, a run folder with the adapter out."""

import math
import threading
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from jlora.cli.command import run_command
from jlora.cli.process_setup import keep_compiled, keep_freed_memory
from jlora.config.lora_config import LoraConfig
from jlora.config.run_config import (
    ComputeConfig,
    DataConfig,
    MeshConfig,
    OptimConfig,
    TrainConfig,
    check_seed,
)
from jlora.data import Tokenizer, load_split, make_samples, plan_lines
from jlora.formats.digests import fingerprint
from jlora.formats.load_params import abstract_params, load_params
from jlora.formats.open_model import open_model
from jlora.formats.peft.adapter_writer import save_adapter
from jlora.formats.peft.attach_adapter import initialise_adapter
from jlora.loading import open_adapter
from jlora.lora.adapter_tree import Params, count_parameters, format_parameter_count
from jlora.model.llama import Llama
from jlora.parallel.processes import check_agreement, joined_processes
from jlora.parallel.sharding import check_divisible, make_mesh, parameter_sharding
from jlora.report.run_report import plot, show_samples
from jlora.train.fit import Entry, fit, write_settings
from jlora.train.loop import stop_requests
from jlora.train.memory_estimate import flops_per_token, memory_table, plan_workload
from jlora.train.resuming import check_run, locked
from jlora.train.sweep import start_member
from jlora.train.sweep_file import check_members, compute_of_sweep, read_sweep


@dataclass(frozen=True)
class Arguments:
    """Fine-tune a Llama with LoRA."""

    model: str
    """HF folder, hub id, .gguf file or converted base."""
    output_dir: str
    """Run folder: checkpoints, metrics.jsonl, adapter/ and report.png."""
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    seed: int = 0
    """Seed of the adapter's start, the order of the data and dropout."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Continue from the newest checkpoint in output_dir: if there is one, never, or always."""
    init_adapter: str | None = None
    """PEFT adapter to continue from; its settings replace the lora group's."""
    sweep: str | None = None
    """YAML file: adapters to train at once, by name, with what differs."""
    plan: bool = False
    """Print what would be trained and whether it fits, then stop."""

    def __post_init__(self) -> None:
        """Raises UsageError for a seed that is none."""
        check_seed(self.seed)


def main(args: Arguments) -> None:
    """Runs the whole fine-tune, in the order things happen."""
    with joined_processes(), stop_requests() as stop:
        keep_freed_memory()
        check_agreement(asdict(args))  # before they compute anything together
        train(args, stop)


def train(args: Arguments, stop: threading.Event) -> None:
    """As `main`; a stop that is asked for early is heeded after a step or two."""
    every = read_sweep(args)  # one run without a name, if it is no sweep
    for own in () if args.plan else every.values():
        check_run(Path(own.output_dir), args.resume)
    mesh = make_mesh(args.mesh)
    keep_compiled()
    source = open_model(args.model)
    config = source.config
    sized = args.data.sized(config.max_position_embeddings)
    config.check_length(sized.row_length, "data.seq_len")
    check_divisible(mesh, config, args.train.batch_size, args.train.grad_accum_steps)
    # The data comes first: a mistake in it shows before the weights are read.
    tokenizer = Tokenizer.from_files(source.files, config)
    load = partial(load_split, tokenizer, sized, vocab_size=config.vocab_size)
    seeds = list(dict.fromkeys(own.seed for own in every.values()))
    splits = {s: load(seed=s, batch_size=args.train.batch_size) for s in seeds}
    data, held_out = splits[seeds[0]]

    given = {
        name: open_adapter(own.init_adapter) if own.init_adapter else None
        for name, own in every.items()
    }

    def initialise(name: str, base: Params) -> tuple[Params, LoraConfig]:
        own = every[name]
        return initialise_adapter(
            base, config, own.lora, seed=own.seed, adapter=given[name]
        )

    shapes = abstract_params(source, dtype=args.compute.base_dtype)  # type: ignore[arg-type]
    planned = {name: initialise(name, shapes) for name in every}
    trees = {name: params for name, (params, _) in planned.items()}
    check_members([split[0] for split in splits.values()], trees)
    for name, (params, _) in planned.items():
        print(f"{name}: " * bool(name) + format_parameter_count(params), flush=True)
    print("\n".join(data.summary + (held_out.summary if held_out else [])))
    epoch_steps = math.ceil(args.train.num_epochs * data.steps_per_epoch)
    total_steps = args.train.max_steps or epoch_steps
    params = max(trees.values(), key=count_parameters)
    segments = max(d.max_segments for d in (data, held_out) if d)
    work = plan_workload(
        config,
        params,
        mesh,
        compute=compute_of_sweep(args.compute, len(every), packed=args.data.packing),
        rows=args.train.batch_size // args.train.grad_accum_steps,
        length=data.row_length,
        max_segments=segments,
        adapters=len(every),
    )
    compute = work.compute
    beside = f" for each of {len(every)} adapters" * (len(every) > 1)
    print(
        f"{total_steps} steps of {args.train.batch_size} x {data.row_length} tokens"
        f"{beside} on {mesh.size} {mesh.devices.flat[0].device_kind}: {compute.dtype.name}, "
        f"attention {compute.attention}, kernels {compute.kernels}, remat {compute.remat}",
        flush=True,
    )
    if args.plan:
        print("\n".join([*plan_lines(data), *memory_table(params, work), ""]))
        show_samples(make_samples(data, tokenizer))
        return
    model = Llama.with_compute(config, compute)
    base = load_params(
        source,
        dtype=args.compute.base_dtype,  # type: ignore[arg-type]
        sharding=lambda path, _: parameter_sharding(mesh, tuple(path.split("/"))),
    )
    adapters = {name: initialise(name, base) for name in every}
    shared = {  # what a resumed run has to share with the one it continues
        "base": fingerprint(base),
        "tokenizer": tokenizer.fingerprint,
        "batch_size": args.train.batch_size,
        "data.packing": args.data.packing,
        "data.seq_len": data.row_length,
    }
    entries = []
    for name, own in every.items():
        params, lora = adapters[name]
        data, held_out = splits[own.seed]
        identity = {"data": data.fingerprint, "lora": asdict(lora), "seed": own.seed}
        meta = {
            "settings": {**asdict(own), "lora": asdict(lora)},
            "identity": {**shared, **identity},
            "versions": {n: version(n) for n in ("jax", "flax", "optax")},
            "sweep": list(every),
        }
        member = start_member(own.optim, own.seed, lora.lora_dropout, params, mesh)
        entries.append(
            Entry(
                name=name,
                folder=Path(own.output_dir),
                member=member,
                meta=meta,
                data=data,
                held_out=held_out,
                flops_per_token=flops_per_token(params, config, data.row_length),
            )
        )

    def export(index: int, tuned: Params) -> None:
        folder, lora = entries[index].folder, list(adapters.values())[index][1]
        name, out = lora.base_model_name_or_path or args.model, folder / "adapter"
        save_adapter(tuned, lora, out, name, overwrite=True)
        plot(folder)
        print(f"adapter written to {out}")

    with locked(Path(args.output_dir)) if args.sweep else nullcontext():
        if args.sweep:
            write_settings(Path(args.output_dir), asdict(args))
        fit(
            entries,
            model,
            mesh,
            args.train,
            total_steps=total_steps,
            packed=args.data.packing,
            mode=args.resume,
            stop=stop,
            export=export,
        )


if __name__ == "__main__":
    raise SystemExit(run_command(main, Arguments))
