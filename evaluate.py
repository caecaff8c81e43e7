"""Loss and perplexity of a model on a file, with or without an adapter."""

import math
from dataclasses import dataclass
from typing import Literal

import jax

from jlora.cli.command import run_command
from jlora.cli.compilation_cache import keep_compiled
from jlora.cli.malloc import keep_freed_memory
from jlora.config.run_config import DataConfig, MeshConfig
from jlora.data import Tokenizer, load_dataset, make_samples, plan_lines
from jlora.errors import UsageError
from jlora.formats.load_params import load_params
from jlora.formats.open_model import open_model
from jlora.formats.peft.attach_adapter import attach_adapter, model_config
from jlora.loading import open_adapter
from jlora.model.llama import Llama, compute_dtype
from jlora.ops.attention import choose_attention
from jlora.parallel.sharding import check_divisible, make_mesh, tree_shardings
from jlora.report.run_report import show_samples
from jlora.train.step import evaluate, make_eval_step


@dataclass(frozen=True)
class Arguments:
    """Print the loss, perplexity and supervised tokens of a data set."""

    model: str
    """HF folder, hub id, .gguf file or converted base."""
    data: list[str] | dict[str, float] | str
    """File, folder or glob with records, or a list of them."""
    adapter: str | None = None
    """Run folder or PEFT adapter folder."""
    format: Literal[
        "auto", "text", "prompt_completion", "messages", "alpaca", "sharegpt"
    ] = "auto"
    """Record format; auto reads it off the first record's keys."""
    fields: dict[str, str] | None = None
    """What the data calls the format's columns, such as {prompt: question}."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """What to do with rows that cannot be used: list them and stop, or leave them out."""
    max_bad_rows: int = 100
    """Most rows that on_bad_row=skip leaves out; more stop the run."""
    train_on: Literal["auto", "assistant", "last_assistant", "completion", "all"] = (
        "auto"
    )
    """Which tokens the loss counts, as in train.py."""
    cache_dir: str | None = None
    """Folder that keeps token ids between runs; default: $JLORA_CACHE, or ~/.cache/jlora."""
    seq_len: int | None = None
    """Tokens per row; longer records are cut there. null: 512, or the model's most if less."""
    packing: bool = False
    """Put several records in one row; the loss is the same."""
    batch_size: int = 8
    """Rows at a time, over all devices."""
    show: bool = False
    """Print the data as the model would read it, then stop."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Activations and matmuls; auto: bfloat16 on GPU and TPU, float32 on CPU."""


def main(args: Arguments) -> None:
    """Loads the model and the data, and prints one line."""
    if args.batch_size < 1:
        raise UsageError(f"batch_size={args.batch_size}; expected at least 1")
    settings = DataConfig(
        format=args.format,
        fields=args.fields,
        on_bad_row=args.on_bad_row,
        max_bad_rows=args.max_bad_rows,
        cache_dir=args.cache_dir,
        seq_len=args.seq_len,
        packing=args.packing,
        train_on=args.train_on,
    )
    source = open_model(args.model)
    adapter = None if args.adapter is None else open_adapter(args.adapter)
    config = model_config(adapter, source.config) if adapter else source.config
    settings = settings.sized(config.max_position_embeddings)
    config.check_length(settings.row_length, "seq_len")
    tokenizer = Tokenizer.from_files(source.files, config)
    data = load_dataset(
        args.data,
        tokenizer,
        settings,
        vocab_size=config.vocab_size,
        batch_size=args.batch_size,
        seed=0,
        shuffle=False,
    )
    if args.show:
        print("\n".join([*data.summary, *plan_lines(data), ""]))
        show_samples(make_samples(data, tokenizer))
        return
    keep_freed_memory()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    keep_compiled()
    check_divisible(mesh, config, args.batch_size)
    params = load_params(source)
    if adapter is not None:
        params = attach_adapter(params, source.config, adapter)
    params = jax.device_put(params, tree_shardings(mesh, params))
    dtype = compute_dtype(args.dtype)
    attention = choose_attention("auto", dtype=dtype, head_dim=config.head_dim)
    model = Llama(config, dtype, attention, max_segments=data.max_segments)
    step = make_eval_step(model, mesh, params=params, packed=args.packing)
    loss, count = evaluate(step, params, data, mesh)
    print(
        f"loss: {loss:.6f} || perplexity: {math.exp(min(loss, 700)):.4f} || "
        f"tokens: {count:,d}"
    )


if __name__ == "__main__":
    raise SystemExit(run_command(main, Arguments))
