"""Fine-tune a Llama with LoRA: model and data in, a run folder with the adapter out."""

import math
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import yaml
from jax.sharding import Mesh

from convert.peft import attach_adapter, open_adapter, write_adapter
from convert.source import Source, abstract_params, load_params, open_source
from jlora.checkpoint import RunCheckpoints, fingerprint, locked, resume
from jlora.cli import run_command
from jlora.config import LoraConfig
from jlora.data import Prefetch, Tokenizer, load_split, make_samples, plan_lines
from jlora.errors import StopRequested
from jlora.loop import StepLog, check_remaining, is_due, stop_requests
from jlora.lora import Params, format_parameter_count, join
from jlora.lora_init import add_lora
from jlora.model import Llama
from jlora.optimizer import make_optimizer, make_schedule
from jlora.plan import flops_per_token, memory_table, plan_workload
from jlora.report import Report, plot, show_samples
from jlora.settings import (
    ComputeConfig,
    DataConfig,
    MeshConfig,
    OptimConfig,
    TrainConfig,
    check_seed,
)
from jlora.sharding import check_divisible, make_mesh, parameter_sharding
from jlora.training import TrainState, evaluate, make_eval_step, make_train_step


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
    plan: bool = False
    """Print what would be trained and whether it fits, then stop."""

    def __post_init__(self) -> None:
        """Raises UsageError for a seed that is none."""
        check_seed(self.seed)


def main(args: Arguments) -> None:
    """Runs the whole fine-tune, in the order things happen."""
    mesh = make_mesh(args.mesh)
    source = open_source(args.model)
    config = source.config
    config.check_length(args.data.seq_len, "data.seq_len")
    check_divisible(mesh, config, args.train.batch_size, args.train.grad_accum_steps)
    # The data comes first: a mistake in it shows before the weights are read.
    tokenizer = Tokenizer.from_files(source.files, config)
    data, held_out = load_split(
        tokenizer,
        args.data,
        vocab_size=config.vocab_size,
        batch_size=args.train.batch_size,
        seed=args.seed,
    )
    base, params, lora = load_model(args, source, mesh)
    print(format_parameter_count(params))
    print("\n".join(data.summary + (held_out.summary if held_out else [])))
    epoch_steps = math.ceil(args.train.num_epochs * data.steps_per_epoch)
    total_steps = args.train.max_steps or epoch_steps
    work = plan_workload(
        config,
        params,
        mesh,
        compute=args.compute,
        rows=args.train.batch_size // args.train.grad_accum_steps,
        length=data.row_length,
    )
    print(
        f"{total_steps} steps of {args.train.batch_size} x {data.row_length} tokens on "
        f"{mesh.size} {jax.devices()[0].device_kind}: {work.dtype.name}, "
        f"attention {work.attention}, kernels {work.kernels}, remat {work.remat}",
        flush=True,
    )
    if args.plan:
        print("\n".join([*plan_lines(data), *memory_table(params, work), ""]))
        show_samples(make_samples(data, tokenizer))
        return
    segments = max(d.max_segments for d in (data, held_out) if d)
    options = (work.dtype, work.attention, work.remat, lora.lora_dropout, segments)
    model = Llama(config, *options, kernels=work.kernels)
    schedule = make_schedule(args.optim, total_steps)
    optimizer = make_optimizer(args.optim, schedule)
    state, frozen = TrainState.create(params, optimizer, mesh)
    step = make_train_step(
        model,
        optimizer,
        mesh,
        state=state,
        frozen=frozen,
        packed=args.data.packing,
        grad_accum_steps=args.train.grad_accum_steps,
        seed=args.seed,
    )
    eval_step = make_eval_step(model, mesh, params=params, packed=args.data.packing)

    run = Path(args.output_dir)
    settings = {**asdict(args), "lora": asdict(lora)}
    identity = {  # what a resumed run has to share with the one it continues
        "base": fingerprint(base),
        "tokenizer": tokenizer.fingerprint,
        "data": data.fingerprint,
        "lora": settings["lora"],
        "seed": args.seed,
        "batch_size": args.train.batch_size,
    }
    versions = {name: version(name) for name in ("jax", "flax", "optax")}
    meta = {"settings": settings, "identity": identity, "versions": versions}
    with locked(run), stop_requests() as stop:
        state = resume(run, state, meta, mode=args.resume)
        start = int(state.step)
        check_remaining(run, start, total_steps)
        (run / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        checkpoints = RunCheckpoints(run / "checkpoints", args.train.keep)
        flops = flops_per_token(params, config, data.row_length)
        with (
            Report(run, total_steps=total_steps, start_step=start) as report,
            Prefetch(data, mesh, start=start, stop=total_steps) as batches,
        ):
            log = StepLog(
                report,
                schedule,
                flops_per_token=flops,
                steps_per_epoch=data.steps_per_epoch,
                log_every=args.train.log_every,
            )
            for done, batch in enumerate(batches, start + 1):
                state, metrics = step(state, frozen, batch)
                log.add(done, metrics, batches.waited_s)
                stopping = stop.is_set() and done < total_steps
                evaluating = is_due(done, args.train.eval_every, total_steps)
                if held_out and evaluating and not stopping:
                    log.flush()
                    tuned = join(state.trainable, frozen)
                    eval_loss, _ = evaluate(eval_step, tuned, held_out, mesh)
                    report.log(step=done, eval_loss=eval_loss)
                # Saved after the evaluation, which a resumed run does not repeat.
                if stopping or is_due(done, args.train.save_every, total_steps):
                    log.flush()
                    checkpoints.save(done, state, meta)
                if stopping:
                    raise StopRequested(f"step {done} is saved; run it again to go on")
        checkpoints.close()
        adapter = run / "adapter"
        tuned = join(state.trainable, frozen)
        write_adapter(tuned, lora, adapter, args.model, overwrite=True)
        plot(run)
    print(f"adapter written to {adapter}")


def load_model(
    args: Arguments, source: Source, mesh: Mesh
) -> tuple[Params, Params, LoraConfig]:
    """Returns (base on the mesh, base with adapter, the adapter's settings)."""
    dtype: Any = args.compute.base_dtype
    if args.plan:  # for which shapes are enough
        base = abstract_params(source, dtype=dtype)
    else:
        base = load_params(
            source,
            dtype=dtype,
            sharding=lambda path, _: parameter_sharding(mesh, tuple(path.split("/"))),
        )
    if args.init_adapter is None:
        add = partial(add_lora, config=args.lora, key=jax.random.key(args.seed))
        return base, jax.eval_shape(add, base) if args.plan else add(base), args.lora
    adapter = open_adapter(args.init_adapter)
    lora = replace(adapter.config, lora_dropout=args.lora.lora_dropout)
    return base, attach_adapter(base, source.config, adapter, train=True), lora


if __name__ == "__main__":
    raise SystemExit(run_command(main, Arguments))
