"""Compiles a training step for devices that are only described, and prints its memory.

No GPU or TPU is needed, but the compiler for one (not with `--device cpu`):

    pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvrtc nvidia-cuda-runtime
    python benchmarks/compiled_memory.py B --base-dtype nf4 --remat full --layers 4 8
    pip install libtpu
    python benchmarks/compiled_memory.py B --device v5e:2x2 --fsdp 4 --layers 1 --attention splash

The JSON line of each number of layers has the compiler's own bytes, in GiB: `arguments` are
weights, adapter, optimizer state and batch; `temporary` is what a step adds on the device;
`planned` is the estimate of `jlora train --plan`. What each further layer adds to
`temporary` is what is saved for the backward pass, so a few layers tell about all. With
several devices, `collectives` are those of the program; `kernels_in_program` counts kernels that
are not XLA's own.
"""

import argparse
import json
import math
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
# Choosing among kernels by timing them needs the device.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
)

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh
from step_time import QUANTIZERS, WORKLOADS, Workload, collectives, random_base

from jlora.config.optim_config import OptimConfig
from jlora.config.run_config import MeshConfig
from jlora.lora.adapter_tree import split, trainable_mask
from jlora.lora.initialisation import add_lora
from jlora.model.llama import Llama
from jlora.model.remat.layer_runs import equal_runs, stacked
from jlora.parallel.sharding import (
    MESH_AXES,
    batch_sharding,
    make_mesh,
    tree_shardings,
)
from jlora.train.device_model import loops_over_layers
from jlora.train.memory_estimate import plan_workload
from jlora.train.optimizer import make_optimizer, make_schedule
from jlora.train.planning import planned_bytes
from jlora.train.step import TrainState, make_train_step

# Of Pallas on a TPU and on a GPU, and cuDNN's.
_KERNELS = r'custom_call_target="(?:tpu_custom_call|mosaic_gpu|__cudnn)'
DESCRIPTION = Path(__file__).parent / "h200.txtpb"


def described(device: str, config: MeshConfig) -> Mesh:
    """Returns a mesh of devices that are not there: "h200", or a slice such as "v5e:2x4"."""
    if device != "h200":
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # asks a host of Google's
        found = topologies.get_topology_desc(platform="tpu", topology_name=device)
        return make_mesh(config, list(found.devices))
    from jax._src.cudnn import fused_attention_stablehlo

    # The rule for attention asks the installed cuDNN for its version.
    fused_attention_stablehlo.check_cudnn_version = lambda: 91200
    size = math.prod(getattr(config, axis) for axis in MESH_AXES)
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=DESCRIPTION.read_text(), topology=f"1x1x{size}"
    )
    return make_mesh(config, list(topology.devices))


def compiled_step(work: Workload, mesh: Mesh) -> tuple[Any, dict[str, Any]]:
    """Returns the compiled step of a workload, each device with its rows, and its memory."""
    rows = work.rows_on(mesh)

    def make_params() -> Any:
        dtype = jnp.dtype(work.compute.dtype)
        base = random_base(work.config, dtype, work.compute.base_dtype)
        return add_lora(base, work.lora, jax.random.key(1))

    params = jax.eval_shape(make_params)
    planned = plan_workload(
        work.config,
        params,
        mesh,
        compute=work.compute,
        rows=rows,
        length=work.length,
    )
    model = Llama.with_compute(work.config, planned.compute)
    optimizer = make_optimizer(OptimConfig(), make_schedule(OptimConfig(), 100))
    trainable, frozen = split(params, trainable_mask(params))
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        trainable=trainable,
        opt_state=jax.eval_shape(optimizer.init, params),
        skipped=jax.ShapeDtypeStruct((), jnp.int32),
        skipped_in_a_row=jax.ShapeDtypeStruct((), jnp.int32),
    )
    if loops_over_layers(mesh):
        runs = equal_runs(params["layers"])
        frozen = jax.eval_shape(lambda tree: stacked(tree, runs), frozen)
    state, frozen = (
        _placed(tree, tree_shardings(mesh, tree)) for tree in (state, frozen)
    )
    step = make_train_step(
        model, optimizer, mesh, state=state, frozen=frozen, packed=False
    )
    shape = rows, work.length
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
        for name, dtype in {
            "tokens": jnp.int32,
            "targets": jnp.int32,
            "loss_mask": jnp.float32,
            "segment_ids": jnp.int32,
            "positions": jnp.int32,
        }.items()
    }
    lowered, start = step.lower(state, frozen, batch), time.perf_counter()
    compiled = lowered.compile()
    found, seconds = compiled.memory_analysis(), time.perf_counter() - start
    gib = 2**30
    return compiled, {
        "layers": work.config.num_hidden_layers,
        "remat": planned.compute.remat,
        "kernels": planned.compute.kernels,
        "base_dtype": work.compute.base_dtype,
        "arguments": round(found.argument_size_in_bytes / gib, 3),
        "temporary": round(found.temp_size_in_bytes / gib, 3),
        "host": round(found.host_temp_size_in_bytes / gib, 3),
        "planned": round(sum(planned_bytes(params, planned).values()) / gib, 3),
        "compile_s": round(seconds, 1),
        "kernels_in_program": len(re.findall(_KERNELS, compiled.as_text())),
        **({"collectives": collectives(compiled.as_text())} if mesh.size > 1 else {}),
    }


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        tree,
        shardings,
    )


def main() -> None:
    """Prints a line for each number of layers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument(
        "--device", default="h200", help="h200, cpu, or a TPU slice, such as v5e:2x4"
    )
    parser.add_argument(
        "--attention", choices=("auto", "splash", "xla"), default="auto"
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--kernels", choices=("auto", "xla", "hopper"), default="auto")
    parser.add_argument("--base-dtype", choices=QUANTIZERS, help="quantise the weights")
    parser.add_argument("--remat", choices=("none", "minimal", "full", "offload"))
    for axis in MESH_AXES:
        parser.add_argument(f"--{axis}", type=int, default=1, help="number of devices")
    parser.add_argument("--hlo", type=Path, help="write the compiled program here")
    args = parser.parse_args()
    work = WORKLOADS[args.workload]
    wanted = MeshConfig(**{axis: getattr(args, axis) for axis in MESH_AXES})
    is_cpu = args.device == "cpu"
    mesh = make_mesh(wanted) if is_cpu else described(args.device, wanted)
    compute = replace(
        work.compute,
        kernels=args.kernels,
        attention=args.attention,
        base_dtype=args.base_dtype or work.compute.base_dtype,
        remat=args.remat or work.compute.remat,
    )
    for layers in args.layers:
        config = replace(work.config, num_hidden_layers=layers)
        compiled, found = compiled_step(
            replace(work, config=config, compute=compute), mesh
        )
        if args.hlo:
            args.hlo.write_text(compiled.as_text())
        print(json.dumps({"workload": args.workload} | found), flush=True)


if __name__ == "__main__":
    main()
