"""What is printed before step 1: what would be trained, on what, and whether it fits."""

from collections.abc import Mapping

from jax.sharding import Mesh

from jlora.data.batch.batches import Dataset
from jlora.data.batch.preview import preview_lines, preview_samples
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.lora.adapter_tree import Params, format_parameter_count
from jlora.report.samples import show_samples
from jlora.train.memory_estimate import Workload, memory_table


def print_summary(
    trees: Mapping[str, Params],
    data: Dataset,
    held_out: Dataset | None,
    total_steps: int,
    mesh: Mesh,
    work: Workload,
) -> None:
    """Prints parameters, data, steps and devices.

    Args:
        trees: shapes of the base with each adapter, by its name; "" for the only one.
        data: to train on.
        held_out: to evaluate on, or None.
        total_steps: of the run.
        mesh: devices.
        work: what every `auto` stands for.
    """
    for name, tree in trees.items():
        label = f"{name}: " if name else ""
        print(label + format_parameter_count(tree), flush=True)
    print("\n".join(data.summary + (held_out.summary if held_out else [])))
    each = f" for each of {len(trees)} adapters" if len(trees) > 1 else ""
    compute = work.compute
    print(
        f"{total_steps} steps of {data.batch_size} x {data.row_length} tokens{each} on "
        f"{mesh.size} {mesh.devices.flat[0].device_kind}: {compute.dtype.name}, attention "
        f"{compute.attention}, kernels {compute.kernels}, remat {compute.remat}",
        flush=True,
    )


def print_plan(
    data: Dataset, tokenizer: Tokenizer, params: Params, work: Workload
) -> None:
    """Prints a table of the data, the memory of a step, and samples of the data."""
    print("\n".join([*preview_lines(data), *memory_table(params, work), ""]))
    show_samples(preview_samples(data, tokenizer))
