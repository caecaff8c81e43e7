from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.fake_devices import mesh_of
from helpers.training_cases import llama_config

from jlora.config.lora_config import LoraConfig
from jlora.config.run_config import ComputeConfig
from jlora.errors import UsageError
from jlora.lora.initialisation import add_lora
from jlora.lora.projections import can_fuse_any, suitable_length
from jlora.ops.quantize import quantize_kernel
from jlora.train.memory_estimate import plan_workload

SIZE = 256
CONFIG = llama_config(num_hidden_layers=1)


def tree(dtype: str = "bfloat16", size: int = SIZE, **more: Any) -> dict[str, Any]:
    layer = {"kernel": jnp.zeros((size, size), dtype), **more}
    embedding = {"embedding": jnp.zeros((8, size), dtype)}
    return {
        "embed_tokens": embedding,
        "layers": {"0": {"mlp": {"down_proj": layer}}},
        "lm_head": {"kernel": jnp.zeros((SIZE, SIZE), "bfloat16")},
    }


def adapted(**settings: Any) -> dict[str, Any]:
    lora = LoraConfig(target_modules=["down_proj"], **settings)
    return add_lora(tree(), lora, jax.random.key(0))


def quantised() -> dict[str, Any]:
    params = tree()
    kernel = params["layers"]["0"]["mlp"]["down_proj"].pop("kernel")
    params["layers"]["0"]["mlp"]["down_proj"] = quantize_kernel(
        np.asarray(kernel), "int8"
    )
    return params


CASES: dict[str, tuple[Callable[[], Any], bool]] = {
    "plain": (tree, True),
    "lora": (adapted, True),
    "dora": (partial(adapted, use_dora=True), True),
    "pissa": (partial(adapted, init_lora_weights="pissa"), False),
    "float32": (partial(tree, "float32"), False),
    "small": (partial(tree, size=96), False),
    "biases": (lambda: tree(bias=jnp.zeros(SIZE)), False),
    "quantised": (quantised, True),
}


@pytest.mark.parametrize(("make", "expected"), CASES.values(), ids=CASES)
def test_a_plan_has_the_fused_kernels_only_for_weights_that_they_take(make, expected):
    params = make()
    assert can_fuse_any(params, jnp.bfloat16) is expected
    work = plan_workload(
        CONFIG,
        params,
        mesh_of("gpu", capability="9.0"),
        compute=ComputeConfig(remat="none"),
        rows=1,
        length=256,
    )
    assert work.compute.kernels == ("hopper" if expected else "xla")


def test_fused_kernels_that_are_asked_for_and_take_no_weight_are_refused():
    with pytest.raises(UsageError, match=r"compute\.kernels=hopper: no weight"):
        plan_workload(
            CONFIG,
            tree(bias=jnp.zeros(SIZE)),
            mesh_of("gpu", capability="9.0"),
            compute=ComputeConfig(remat="none", kernels="hopper"),
            rows=1,
            length=256,
        )


@pytest.mark.parametrize(
    ("rows", "length", "longer"),
    [(1, 256, None), (2, 128, None), (2, 1000, 1024), (3, 300, 512), (8, 33, 64)],
)
def test_tokens_that_the_fused_kernels_do_not_take_are_said(rows, length, longer):
    def plan(kernels):
        return plan_workload(
            CONFIG,
            tree(),
            mesh_of("gpu", capability="9.0"),
            compute=ComputeConfig(remat="none", kernels=kernels),
            rows=rows,
            length=length,
        )

    work = plan("auto")
    assert work.compute.kernels == ("xla" if longer else "hopper")
    assert bool(work.hint) == bool(longer)
    if longer:
        assert rows * longer % 256 == 0
        said = rf"{rows} x {length} tokens.*data\.seq_len {longer} would be faster"
        assert suitable_length(rows, length) == longer
        with pytest.raises(UsageError, match=said):
            plan("hopper")
