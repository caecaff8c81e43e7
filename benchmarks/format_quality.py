"""What training on a quantised base costs in quality: held-out loss, KL and loss curves.

    python benchmarks/format_quality.py --model SmolLM2-135M-Instruct.Q4_1.gguf

The same rows, adapter and seed on a bfloat16 base and on each format. Activations are rounded
to fp8 and int8 as on a device with such products, whatever this one is. The text is what
Python's standard library says of its functions; some modules are held out. KL is that of the
next token's distribution from the bfloat16 model's, in nats per token, before and after training.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from stdlib_docs import build  # type: ignore[import-not-found]
from step_time import unpadded_batch

import jlora
from jlora.config.optim_config import OptimConfig
from jlora.config.run_config import ComputeConfig, MeshConfig
from jlora.lora.adapter_tree import join
from jlora.model.llama import Llama
from jlora.ops.compute_choices import choose_compute
from jlora.parallel.sharding import batch_sharding, make_mesh
from jlora.train.optimizer import make_optimizer, make_schedule
from jlora.train.step import TrainState, make_train_step

FORMATS = ("bfloat16", "fp8", "int8", "nf4")
ADAPTER = jlora.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
COMPARED = 2  # held-out rows whose distributions are compared


def rows_of(tokenizer: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns int32 rows of length + 1 ids, to train on and held out."""
    found = []
    with TemporaryDirectory() as folder:
        build(Path(folder))
        for name in ("train", "held_out"):
            lines = (Path(folder) / f"{name}.jsonl").read_text("utf-8").splitlines()
            texts = ["\n".join(_strings(json.loads(line))) for line in lines]
            ids = tokenizer.encode("\n\n".join(texts))
            count = len(ids) // (length + 1)
            found.append(np.array(ids[: count * (length + 1)], np.int32))
    train, held_out = (ids.reshape(-1, length + 1) for ids in found)
    return np.random.default_rng(0).permutation(train), held_out


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [text for part in parts for text in _strings(part)]


def train(
    args: argparse.Namespace, stored: str, mesh: Mesh, rows: np.ndarray, held: Any
) -> dict[str, Any]:
    """Returns the losses of one run, and its distributions before and after."""
    loaded, base, _ = jlora.load(args.model, dtype="bfloat16", base_dtype=stored)  # type: ignore[arg-type]
    params = jlora.add_lora(base, ADAPTER, jax.random.key(1))
    config = loaded.config
    wanted = ComputeConfig(dtype="bfloat16")
    compute = choose_compute(wanted, mesh, head_dim=config.head_dim)
    model = Llama.with_compute(config, compute).clone(
        code_products=("fp8", "int8"), kernels="xla"
    )
    settings = OptimConfig(learning_rate=5e-4, lr_schedule="cosine")
    optimizer = make_optimizer(settings, make_schedule(settings, args.steps))
    state, frozen = TrainState.create(params, optimizer, mesh)
    step = make_train_step(
        model, optimizer, mesh, state=state, frozen=frozen, packed=False
    )

    @jax.jit
    def log_probabilities(trainable: Any, frozen: Any, tokens: Any) -> Any:
        logits: Any = model.apply({"params": join(trainable, frozen)}, tokens)
        return jax.nn.log_softmax(logits)

    def held_out(trainable: Any) -> tuple[float, np.ndarray]:
        losses, kept = [], []
        for i in range(0, len(held), args.rows):
            tokens = held[i : i + args.rows]
            found = log_probabilities(trainable, frozen, tokens[:, :-1])
            picked = jnp.take_along_axis(found, tokens[:, 1:, None], axis=2)
            losses.append(-np.asarray(picked))
            kept += [np.asarray(row) for row in found[: COMPARED - len(kept)]]
        return float(np.concatenate(losses).mean()), np.stack(kept)

    before, losses = held_out(state.trainable), []
    for i in range(args.steps):
        place = i * args.rows % (len(rows) - args.rows + 1)
        batch = unpadded_batch(rows[place : place + args.rows])
        batch = jax.device_put(batch, batch_sharding(mesh))
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    return {"losses": losses, "before": before, "after": held_out(state.trainable)}


def divergence(found: np.ndarray, reference: np.ndarray) -> float:
    """Returns the mean KL of `found` from `reference`, both log probabilities."""
    return float((np.exp(reference) * (reference - found)).sum(axis=-1).mean())


def plot(curves: dict[str, list[float]], file: Path) -> None:
    """Draws the loss curves, each the mean of ten steps."""
    import matplotlib.pyplot as plt  # type: ignore[import-not-found]

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, losses in curves.items():
        smooth = np.convolve(losses, np.ones(10) / 10, "valid")
        axes.plot(np.arange(len(smooth)) + 10, smooth, label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="loss, mean of ten steps")
    axes.legend()
    figure.savefig(file)


def main() -> None:
    """Prints a line for each format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--held-out-rows", type=int, default=64)
    parser.add_argument("--out", type=Path, help="write the loss curves to this JSON")
    parser.add_argument("--plot", type=Path, help="draw them (needs matplotlib)")
    args = parser.parse_args()
    _, _, tokenizer = jlora.load(args.model, dtype="keep")
    rows, held = rows_of(tokenizer, args.length)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    curves: dict[str, list[float]] = {}
    reference: dict[str, Any] = {}
    for stored in FORMATS:
        made = train(args, stored, mesh, rows, held[: args.held_out_rows])
        curves[stored], reference = made["losses"], reference or made
        line: dict[str, Any] = {
            "format": stored,
            "device": jax.devices()[0].device_kind,
        }
        for when in ("before", "after"):
            loss, found = made[when]
            line[f"held_out_loss_{when}"] = round(loss, 4)
            line[f"kl_{when}"] = round(divergence(found, reference[when][1]), 5)
        line["of_bfloat16"] = round(made["after"][0] / reference["after"][0], 4)
        print(json.dumps(line), flush=True)
    if args.out:
        args.out.write_text(json.dumps(curves))
    if args.plot:
        plot(curves, args.plot)


if __name__ == "__main__":
    main()
