"""Loss and answers of a model on a file: with an adapter, with several, with none."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jlora.cli.command import in_own_flags, run_command
from jlora.cli.flags import REPEATED
from jlora.cli.process_setup import keep_compiled, keep_freed_memory
from jlora.config.json_fields import MAX_SIZE
from jlora.config.run_config import (
    ComputeConfig,
    ModelConfig,
    OneDeviceConfig,
    RowConfig,
)
from jlora.errors import UsageError

if TYPE_CHECKING:
    from jlora.serving.held_out import Question


@dataclass(frozen=True, kw_only=True)
class Arguments(ModelConfig):
    """Print the loss, perplexity and supervised tokens of a data set."""

    data_: (
        list[str] | dict[str, float] | str
    )  # --data, beside the group's --data.seq_len
    """File, folder, glob or hub id with records, or a list of them."""
    data: RowConfig = field(default_factory=RowConfig)
    mesh: OneDeviceConfig = field(default_factory=OneDeviceConfig)
    batch_size: int = 8
    """Rows at a time, over all devices."""
    adapters: list[str] = field(default_factory=list, metadata=REPEATED)
    """Adapters to compare in one table, the base included: '[run1,run2]', or several times."""
    generate: int = 0
    """Records whose answers are also generated and compared with their own (exact, chrF)."""
    max_new_tokens: int | None = None
    """Most tokens of an answer; null: 256, or when the model's positions are full."""
    answers: str | None = None
    """JSONL file to write with prompt, reference and answers of each of these records."""
    show: bool = False
    """Print the data as the model would read it, then stop."""

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range."""
        super().__post_init__()
        if not 1 <= self.batch_size <= MAX_SIZE:
            raise UsageError(
                f"batch_size={self.batch_size}; expected 1 to {MAX_SIZE:,}"
            )
        if self.adapters and self.adapter is not None:
            raise UsageError("give --adapter, or --adapters with it among them")
        if not 0 <= self.generate <= MAX_SIZE:
            raise UsageError(f"generate={self.generate}; expected at least 0 records")
        if self.show and (self.generate or self.adapters):
            raise UsageError(
                "--show prints data alone; leave out --generate, --adapters"
            )
        for name in ("max_new_tokens", "answers"):
            if getattr(self, name) is not None and not self.generate:
                raise UsageError(f"--{name} has no effect without --generate")


def main(args: Arguments) -> None:
    """Joins the processes that the environment names, and evaluates."""
    # What needs JAX is imported here: --help and a wrong flag are answered without it.
    from jlora.parallel.launch import hide_log_of_aborts

    hide_log_of_aborts()
    from jlora.parallel.processes import check_agreement, joined_processes

    with joined_processes():
        keep_freed_memory()
        check_agreement(asdict(args))  # before they compute anything together
        evaluate_all(args)


def evaluate_all(args: Arguments) -> None:
    """Loads the model and the data, and prints a line, or a table of several adapters."""
    import jax

    from jlora.data.batch.load_dataset import load_dataset
    from jlora.data.batch.preview import preview_lines, preview_samples
    from jlora.data.read.splits import TO_EVALUATE
    from jlora.data.tokenize.tokenizer import Tokenizer
    from jlora.formats.peft.adapter_placement import adapted_config
    from jlora.loading import Base, TextModel, model_for_text, open_adapter
    from jlora.model.llama import Llama
    from jlora.ops.compute_choices import choose_compute
    from jlora.parallel.processes import check_agreement
    from jlora.parallel.sharding import check_divisible, check_length, make_mesh
    from jlora.report.samples import show_samples
    from jlora.serving import held_out
    from jlora.train.evaluation import evaluate, make_eval_step

    if args.generate:
        if jax.process_count() > 1:
            raise UsageError("--generate works in one process; leave it out")
        held_out.import_chrf()
        held_out.check_answers(args.answers)
    base = Base.open(args.model, args.base_dtype)
    source = base.source
    adapters = {name: open_adapter(name) for name in args.adapters}
    if args.adapter is not None:
        adapters[args.adapter] = open_adapter(args.adapter, args.step)
    configs = {n: adapted_config(a, source.config) for n, a in adapters.items()}
    compared = ["base", *adapters] if args.adapters else list(adapters) or ["base"]
    config = configs.get(compared[-1], source.config)
    rows = args.data.sized(config.longest)
    config.check_length(rows.row_length, "data.seq_len")
    tokenizer = Tokenizer(source.files, config)
    data = load_dataset(
        args.data_,
        tokenizer,
        rows,
        vocab_size=config.vocab_size,
        batch_size=args.batch_size,
        seed=0,
        shuffle=False,
        splits=TO_EVALUATE,
    )
    check_agreement(data.fingerprint)
    if args.show:
        summary = in_own_flags("\n".join(data.summary), Arguments)
        print("\n".join([summary, *preview_lines(data), ""]))
        show_samples(preview_samples(data, tokenizer))
        return
    questions: list[Question] = []
    if args.generate:
        questions = held_out.questions_of(
            data, tokenizer, args.generate, config.longest
        )
    mesh = make_mesh(args.mesh)
    keep_compiled()
    check_divisible(mesh, config, args.batch_size)
    check_length(mesh, data.row_length)
    base_params = base.load(mesh)
    compute = choose_compute(
        ComputeConfig(dtype=args.dtype, kernels="xla"),
        mesh,
        head_dim=config.head_dim,
        max_segments=data.max_segments,
    )
    figures: dict[str, dict[str, str]] = {}
    answers: dict[str, list[str]] = {}
    for name in compared:
        params, own_config = base_params, source.config
        if name in adapters:
            params, own_config = base.adapted(adapters[name])
        model = Llama.with_compute(own_config, compute)
        step = make_eval_step(model, mesh, params=params, packed=rows.packing)
        figures[name] = loss_figures(*evaluate(step, params, data, mesh))
        if questions:
            answering = model_for_text(own_config, args.dtype, mesh)
            loaded = TextModel(answering, params, tokenizer)
            answers[name] = held_out.answers_to(
                questions, loaded, max_new_tokens=args.max_new_tokens
            )
            figures[name] |= held_out.figures_of(answers[name], questions)
    for revision in data.revisions:
        print(f"data: {revision}")
    if args.adapters:
        print("\n".join(table_lines(figures)))
    else:
        [found] = figures.values()
        print(" || ".join(f"{name}: {figure}" for name, figure in found.items()))
    if args.answers is not None:
        held_out.write_answers(Path(args.answers), questions, answers)


def loss_figures(loss: float, count: int) -> dict[str, str]:
    """Returns {name: figure} of a loss over so many tokens."""
    return {
        "loss": f"{loss:.6f}",
        "perplexity": f"{math.exp(min(loss, 700)):.4f}",
        "tokens": f"{count:,d}",
    }


def table_lines(figures: dict[str, dict[str, Any]]) -> list[str]:
    """Returns a table with a line for each adapter, the lowest loss first."""
    names = ["adapter", *next(iter(figures.values()))]
    order = sorted(figures, key=lambda name: float(figures[name]["loss"]))
    rows = [names, *([name, *figures[name].values()] for name in order)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


if __name__ == "__main__":
    raise SystemExit(run_command(main, Arguments))
