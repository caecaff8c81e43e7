"""Fine-tune a Llama with LoRA: model and data in, a run folder with the adapter out."""

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jlora.cli.command import run_command
from jlora.cli.process_setup import keep_compiled, keep_freed_memory
from jlora.cli.unread_output import unread_output_is_discarded
from jlora.config.lora_config import LoraConfig
from jlora.config.optim_config import OptimConfig
from jlora.config.report_config import ReportConfig
from jlora.config.run_config import (
    ComputeConfig,
    DataConfig,
    MeshConfig,
    TrainConfig,
    check_device,
    check_seed,
)

if TYPE_CHECKING:
    from jlora.loading import Base
    from jlora.train.stopping import StopRequest


@dataclass(frozen=True)
class Arguments:
    """Fine-tune a Llama with LoRA."""

    model: str
    """HF folder, hub id, .gguf file or converted base."""
    output_dir: str
    """Run folder: checkpoints, metrics.jsonl, adapter/ and report.html."""
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    seed: int = 0
    """Seed of the adapter's initial values, the order of the data and dropout."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: resume if a checkpoint exists; never: refuse a folder with one; must: need one."""
    init_adapter: str | None = None
    """PEFT adapter to continue from; its settings replace the lora group's."""
    sweep: str | None = None
    """YAML file: adapters to train at once, by name, with the settings that differ."""
    plan: bool = False
    """Print what would be trained, whether it fits and how long it takes, then stop."""
    device: str | None = None
    """With --plan: devices that need not be here, as h100, h200:2 (GPUs) or v5e:4x8 (a slice)."""

    def __post_init__(self) -> None:
        """Raises UsageError for a seed that is not one, or a device that is not planned."""
        check_seed(self.seed)
        check_device(self.device, is_plan=self.plan)


def main(args: Arguments) -> None:
    """Joins the processes of this run, and trains until the end or a request to stop."""
    from jlora.train.stopping import stop_requests

    with unread_output_is_discarded(), stop_requests() as stop:
        # What needs JAX is imported here: --help and a wrong flag are answered without it.
        from jlora.parallel.launch import hide_log_of_aborts

        hide_log_of_aborts()
        from jlora.parallel.processes import check_agreement, joined_processes

        with joined_processes():
            keep_freed_memory()
            check_agreement(asdict(args))  # before they compute anything together
            train(args, stop)


def train(args: Arguments, stop: "StopRequest", base: "Base | None" = None) -> None:
    """Runs the whole fine-tune, in the order things happen; `base` is args.model, opened."""
    from jlora.data.batch.load_dataset import load_split
    from jlora.data.batch.preview import first_prompt, preview_samples
    from jlora.data.tokenize.tokenizer import Tokenizer
    from jlora.formats.peft.attach_adapter import initialise_adapter
    from jlora.formats.peft.named_base import name_for_peft
    from jlora.loading import Base, open_adapter
    from jlora.model.llama import Llama
    from jlora.parallel.sharding import check_length
    from jlora.serving.sampler import make_sampler
    from jlora.train import sweep_file
    from jlora.train.export import export_adapter
    from jlora.train.flops import flops_per_token
    from jlora.train.loop import train_runs
    from jlora.train.plan_lines import plan_lines
    from jlora.train.planning import Planner
    from jlora.train.resuming import check_run, model_identity
    from jlora.train.run import Run
    from jlora.train.summary import print_conclusion, print_plan, print_summary

    stop.check()
    # Configuration: `args_of` each adapter, by name. Without a sweep there is one, named "".
    args_of = sweep_file.read_sweep(args)
    for run_args in () if args.plan else args_of.values():
        check_run(Path(run_args.output_dir), args.resume)

    # Model, adapters and mesh: all that can be refused before something large is read.
    stop.check()
    is_own, base = base is None, base or Base.open(args.model, args.compute.base_dtype)
    source, config = base.source, base.source.config
    data_config = args.data.sized(config.longest)
    config.check_length(data_config.row_length, "data.seq_len")
    continued = open_adapter(args.init_adapter) if args.init_adapter else None
    initialise = partial(initialise_adapter, config=config, adapter=continued)
    shapes_of = {
        name: initialise(base.shapes(), lora=run_args.lora, seed=run_args.seed)[0]
        for name, run_args in args_of.items()
    }
    compute = sweep_file.compute_for_adapters(
        args.compute, len(args_of), packed=args.data.packing
    )
    planner = Planner.of(config, shapes_of, compute, args, data_config.row_length)
    if not args.mesh.auto:  # which depends on the rows that there are
        planner.mesh(args.mesh, args.device)
    keep_compiled()

    # Data, before the weights are read: `splits_of` each seed, which decides their order.
    tokenizer = Tokenizer(source.files, config)
    load = partial(load_split, tokenizer, data_config, vocab_size=config.vocab_size)
    seeds = dict.fromkeys(run_args.seed for run_args in args_of.values())
    with stop.ends_body():
        splits_of = {s: load(seed=s, batch_size=args.train.batch_size) for s in seeds}
    data, held_out = next(iter(splits_of.values()))
    args.train.check_evaluation(has_data=held_out is not None)
    datasets = [split[0] for split in splits_of.values()]
    sweep_file.check_members(datasets, shapes_of, args_of)
    total_steps = args.train.total_steps(data.steps_per_epoch)

    # Plan: what `auto` means here, and whether the adapter with the most to train fits.
    segments = max(d.max_segments for d in (data, held_out) if d)
    planner = replace(planner, length=data.row_length, max_segments=segments)
    mesh = planner.mesh(args.mesh, args.device)
    if held_out:
        check_length(mesh, held_out.row_length)
    sampler = make_sampler(args, held_out, tokenizer, config, mesh)
    work = planner.on(mesh)
    lines = print_summary(shapes_of, data, held_out, total_steps, mesh, work)
    if args.plan:
        print_plan(data, tokenizer, plan_lines(planner, work, mesh, total_steps))
        return

    # Base, model and adapters: the base is read once and shared.
    with stop.ends_body():
        weights = base.load(mesh)
    model = Llama.with_compute(config, work.compute)
    shared = model_identity(config, weights, continued, tokenizer)
    runs = []
    for name, run_args in args_of.items():
        params, lora = initialise(weights, lora=run_args.lora, seed=run_args.seed)
        run = Run.create(
            run_args,
            params,
            lora,
            splits_of[run_args.seed],
            mesh,
            name=name,
            shared=shared,
            together=list(args_of),
            flops_per_token=flops_per_token(params, config, data.row_length),
            facts={"summary": lines, "samples": preview_samples(data, tokenizer)},
        )
        runs.append(run)
        del params  # the run has a copy of what is trained

    del weights
    if is_own:  # the loop may keep them in another form
        base.params = None

    # The loop: batches, step, log, evaluate, save, stop; and the export at the end.
    conclude = partial(print_conclusion, first_prompt(held_out or data, tokenizer))
    with sweep_file.sweep_folder(args):
        train_runs(
            runs,
            model,
            mesh,
            args.train,
            total_steps=total_steps,
            packed=args.data.packing,
            resume=args.resume,
            stop=stop,
            generate=sampler,
            export=partial(export_adapter, name_for_peft(source, args.model)),
            conclude=conclude,
        )


if __name__ == "__main__":
    raise SystemExit(run_command(main, Arguments))
