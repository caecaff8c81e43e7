"""Loss and perplexity of a model on a file, with or without an adapter."""

import math
from dataclasses import dataclass

from jlora.cli.command import in_own_flags, run_command
from jlora.cli.process_setup import keep_compiled, keep_freed_memory
from jlora.config.json_fields import MAX_SIZE
from jlora.config.run_config import (
    ComputeConfig,
    MeshConfig,
    ModelConfig,
    RowConfig,
)
from jlora.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Arguments(RowConfig, ModelConfig):
    """Print the loss, perplexity and supervised tokens of a data set."""

    data: list[str] | dict[str, float] | str
    """File, folder, glob or hub id with records, or a list of them."""
    batch_size: int = 8
    """Rows at a time, over all devices."""
    show: bool = False
    """Print the data as the model would read it, then stop."""

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range."""
        super().__post_init__()
        ModelConfig.__post_init__(self)
        if not 1 <= self.batch_size <= MAX_SIZE:
            raise UsageError(
                f"batch_size={self.batch_size}; expected 1 to {MAX_SIZE:,}"
            )


def main(args: Arguments) -> None:
    """Loads the model and the data, and prints one line."""
    # What needs JAX is imported here: --help and a wrong flag are answered without it.
    import jax

    from jlora.data.batch.load_dataset import load_dataset
    from jlora.data.batch.preview import preview_lines, preview_samples
    from jlora.data.read.splits import TO_EVALUATE
    from jlora.data.tokenize.tokenizer import Tokenizer
    from jlora.formats.load_params import load_params
    from jlora.formats.open_model import open_model
    from jlora.formats.peft.adapter_placement import adapted_config
    from jlora.formats.peft.attach_adapter import attach_adapter
    from jlora.loading import open_adapter
    from jlora.model.llama import Llama
    from jlora.ops.compute_choices import choose_compute
    from jlora.parallel.sharding import check_divisible, make_mesh, tree_shardings
    from jlora.report.samples import show_samples
    from jlora.train.evaluation import evaluate, make_eval_step

    source = open_model(args.model)
    adapter = None if args.adapter is None else open_adapter(args.adapter, args.step)
    config = adapted_config(adapter, source.config) if adapter else source.config
    rows = args.sized(config.longest)
    config.check_length(rows.row_length, "seq_len")
    tokenizer = Tokenizer(source.files, config)
    data = load_dataset(
        args.data,
        tokenizer,
        rows,
        vocab_size=config.vocab_size,
        batch_size=args.batch_size,
        seed=0,
        shuffle=False,
        splits=TO_EVALUATE,
    )
    if args.show:
        summary = in_own_flags("\n".join(data.summary), Arguments)
        print("\n".join([summary, *preview_lines(data), ""]))
        show_samples(preview_samples(data, tokenizer))
        return
    keep_freed_memory()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    keep_compiled()
    check_divisible(mesh, config, args.batch_size)
    params = load_params(source, dtype=args.base_dtype)
    if adapter is not None:
        params = attach_adapter(params, source.config, adapter)
    params = jax.device_put(params, tree_shardings(mesh, params))
    compute = choose_compute(
        ComputeConfig(dtype=args.dtype, kernels="xla"),
        mesh,
        head_dim=config.head_dim,
        max_segments=data.max_segments,
    )
    model = Llama.with_compute(config, compute)
    step = make_eval_step(model, mesh, params=params, packed=args.packing)
    loss, count = evaluate(step, params, data, mesh)
    for revision in data.revisions:
        print(f"data: {revision}")
    print(
        f"loss: {loss:.6f} || perplexity: {math.exp(min(loss, 700)):.4f} || "
        f"tokens: {count:,d}"
    )


if __name__ == "__main__":
    raise SystemExit(run_command(main, Arguments))
