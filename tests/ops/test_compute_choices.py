import ast
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import pytest
from helpers.fake_devices import mesh_of

from jlora.config.run_config import ComputeConfig
from jlora.errors import UsageError
from jlora.ops.compute_choices import (
    Compute,
    choose_attention,
    choose_compute,
    choose_kernels,
)

BFLOAT16 = jnp.dtype("bfloat16")
BOTH = ("int8", "fp8")
LIBRARY = Path(__file__).parents[2] / "jlora"


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("cpu", "", Compute("cpu", jnp.dtype("float32"))),
        ("gpu", "9.0", Compute("gpu", BFLOAT16, "cudnn", "hopper", BOTH)),
        ("gpu", "10.0", Compute("gpu", BFLOAT16, "cudnn", "xla", BOTH)),
        ("gpu", "8.9", Compute("gpu", BFLOAT16, "cudnn", "xla", BOTH)),
        ("gpu", "8.0", Compute("gpu", BFLOAT16, "cudnn", "xla", ("int8",))),
        ("gpu", "7.5", Compute("gpu", BFLOAT16, "cudnn")),
        ("gpu", "gfx90a", Compute("gpu", BFLOAT16, "cudnn")),
        ("tpu", "", Compute("tpu", BFLOAT16, "splash", code_products=("int8",))),
    ],
)
def test_auto_follows_from_the_devices_of_the_mesh(platform, capability, expected):
    mesh = mesh_of(platform, capability=capability)
    assert choose_compute(ComputeConfig(), mesh, head_dim=64) == expected


def test_float32_activations_are_not_rounded_to_codes():
    mesh = mesh_of("gpu", capability="9.0")
    compute = choose_compute(ComputeConfig(dtype="float32"), mesh, head_dim=64)
    assert compute.code_products == ()


def test_the_loss_takes_smaller_chunks_on_a_cpu():
    assert Compute("cpu").loss_chunk_tokens < Compute("gpu").loss_chunk_tokens


@pytest.mark.parametrize(
    ("wanted", "platform", "head_dim", "message"),
    [
        ("cudnn", "cpu", 64, "needs an NVIDIA GPU, and this is cpu"),
        ("cudnn", "gpu", 256, "head_dim=256"),
        ("splash", "cpu", 64, "splash needs a TPU, and this is cpu"),
    ],
)
def test_attention_is_refused_where_it_cannot_run(wanted, platform, head_dim, message):
    with pytest.raises(UsageError, match=message):
        choose_attention(wanted, platform=platform, dtype=BFLOAT16, head_dim=head_dim)


@pytest.mark.parametrize(
    ("platform", "head_dim", "dtype", "expected"),
    [
        ("gpu", 128, "bfloat16", "cudnn"),
        ("gpu", 256, "bfloat16", "xla"),
        ("gpu", 128, "float32", "xla"),
        ("tpu", 80, "bfloat16", "splash"),
        ("tpu", 128, "float32", "xla"),
        ("cpu", 128, "bfloat16", "xla"),
    ],
)
def test_auto_takes_a_flash_kernel_where_it_applies(
    platform, head_dim, dtype, expected
):
    found = choose_attention(
        "auto", platform=platform, dtype=jnp.dtype(dtype), head_dim=head_dim
    )
    assert found == expected


@pytest.mark.parametrize(
    ("platform", "dtype", "sizes", "message"),
    [
        ("cpu", "bfloat16", (1, 1, 1), "needs an H100 or H200"),
        ("gpu", "float32", (1, 1, 1), "bfloat16"),
    ],
)
def test_hopper_kernels_are_refused_where_they_cannot_run(
    platform, dtype, sizes, message
):
    mesh = mesh_of(platform, sizes, "9.0")
    with pytest.raises(UsageError, match=message):
        choose_kernels("hopper", dtype=jnp.dtype(dtype), mesh=mesh)


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "sizes", "expected"),
    [
        ("gpu", "9.0", "bfloat16", (1, 1, 1), "hopper"),
        ("gpu", "9.0", "bfloat16", (8, 1, 1), "hopper"),
        ("gpu", "9.0", "float32", (1, 1, 1), "xla"),
        ("gpu", "9.0", "bfloat16", (4, 2, 1), "hopper"),
        ("gpu", "9.0", "bfloat16", (4, 1, 2), "hopper"),
        ("gpu", "8.0", "bfloat16", (1, 1, 1), "xla"),
        ("cpu", "", "bfloat16", (1, 1, 1), "xla"),
    ],
)
def test_auto_takes_the_hopper_kernels_where_they_apply(
    platform, capability, dtype, sizes, expected
):
    mesh = mesh_of(platform, sizes, capability)
    assert choose_kernels("auto", dtype=jnp.dtype(dtype), mesh=mesh) == expected


def questions_about_the_default(code: str) -> Iterator[str]:
    """Yields what asks for the platform of JAX's default devices."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute | ast.Name):
            text = ast.unparse(node)
            if text.split(".")[-1] == "default_backend":
                yield text
            if text.endswith(".platform") and "devices()" in text:
                yield text


def test_only_one_module_asks_for_the_default_platform():
    asking = {
        file.relative_to(LIBRARY).as_posix()
        for file in LIBRARY.rglob("*.py")
        if any(questions_about_the_default(file.read_text("utf-8")))
    }
    # The process is set up before there is a mesh.
    assert asking - {"cli/process_setup.py"} == {"ops/compute_choices.py"}


@pytest.mark.parametrize(
    "code",
    [
        "if jax.default_backend() == 'cpu': pass",
        "from jax import default_backend\nplatform = default_backend()",
        "on_gpu = jax.devices()[0].platform == 'gpu'",
        "name = jax.local_devices()[0].platform",
    ],
)
def test_a_question_about_the_default_is_found(code):
    assert any(questions_about_the_default(code))
