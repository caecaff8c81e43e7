"""Quantised kernels: formats, gradients, files and runs."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.adapters import golden
from helpers.tiny import CONFIG as TINY
from helpers.tiny import tensors, write_hf
from helpers.training_cases import (
    ALL_LINEAR,
    Run,
    llama_config,
    logits_of,
    random_params,
    random_tokens,
)

import convert
from convert import to_hf
from jlora.cli.command import run_command
from jlora.config.lora_config import LoraConfig
from jlora.config.run_config import MeshConfig
from jlora.errors import CorruptError, UnsupportedError, UsageError
from jlora.formats.base.base_reader import open_base
from jlora.formats.base.base_writer import write_base
from jlora.formats.describe import describe_model
from jlora.formats.load_params import _cuts_block, abstract_params, load_params
from jlora.formats.open_model import open_model
from jlora.formats.safetensors_file import Spec
from jlora.lora.adapter_tree import count_parameters, trainable_mask
from jlora.lora.initialisation import add_lora
from jlora.lora.lora_dense import LoRADense
from jlora.lora.merging import merge
from jlora.model.llama import Llama
from jlora.ops.compute_choices import Compute
from jlora.ops.quantize import (
    NF4,
    Format,
    kernel_of,
    kernel_shape,
    quantize_kernel,
)
from jlora.parallel.sharding import make_mesh, parameter_sharding
from jlora.train.memory_estimate import Workload, memory_bytes

FORMATS: tuple[Format, ...] = ("fp8", "int8", "nf4")
# As bitsandbytes publishes it (functional.py, get_4bit_type("nf4")), to seven digits.
PUBLISHED = """-1.0 -0.6961928 -0.5250731 -0.3949175 -0.2844414 -0.1847734 -0.0910500 0.0
    0.0795803 0.1609302 0.2461123 0.3379152 0.4407098 0.5626170 0.7229568 1.0"""


def random_kernel(rows: int = 192, columns: int = 40, dtype: Any = np.float32) -> Any:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((rows, columns)) * 0.02).astype(dtype)


def exact(name: Format, kernel: np.ndarray) -> np.ndarray:
    """Returns the nearest values the format has, by brute force in float64."""
    wide = kernel.astype(np.float64)
    if name == "nf4":
        result = np.empty_like(wide)
        for start in range(0, len(wide), 64):
            block = wide[start : start + 64]
            absmax = np.abs(block).max(axis=0)
            distance = np.abs(
                block[..., None] / absmax[:, None] - NF4.astype(np.float64)
            )
            result[start : start + 64] = NF4[distance.argmin(-1)] * absmax
        return result
    if name == "int8":
        values = np.arange(-127, 128, dtype=np.float64)
    else:
        every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
        values = np.unique(
            every.astype(np.float64)[np.isfinite(every.astype(np.float64))]
        )
    scale = np.abs(wide).max(axis=0) / values.max()
    nearest = np.abs((wide / scale)[..., None] - values).argmin(-1)
    return values[nearest] * scale


def test_nf4_of_many_rows_is_that_of_its_blocks():
    kernel = np.random.default_rng(0).standard_normal((2 * 4096 + 80, 3), np.float32)
    found = quantize_kernel(kernel, "nf4")
    parts = [quantize_kernel(kernel[i : i + 64], "nf4") for i in range(0, 8272, 64)]
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, np.concatenate([p[name] for p in parts]))


def test_the_nf4_table_is_the_published_one():
    np.testing.assert_allclose(NF4, [float(x) for x in PUBLISHED.split()], atol=6e-8)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_each_weight_becomes_the_nearest_the_format_has(name, dtype):
    kernel = random_kernel(dtype=dtype)
    found = kernel_of(quantize_kernel(kernel, name), np.float64)
    expected = exact(name, kernel)
    wide = kernel.astype(np.float64)
    # At a tie another neighbour may be chosen, which is as near, but for float32's
    # rounding of the scale.
    slack = 1e-6 * np.abs(wide).max()
    assert (np.abs(found - wide) <= np.abs(expected - wide) + slack).all()


@pytest.mark.parametrize(
    ("name", "bound"), [("fp8", 0.035), ("int8", 0.009), ("nf4", 0.1)]
)
def test_relative_error_of_normal_weights_is_bounded(name, bound):
    kernel = random_kernel(4096, 8)
    error = kernel_of(quantize_kernel(kernel, name), np.float32) - kernel
    assert np.linalg.norm(error) < bound * np.linalg.norm(kernel)


@pytest.mark.parametrize("name", FORMATS)
def test_values_of_a_format_are_kept_when_quantised_again(name):
    leaves = quantize_kernel(random_kernel(), name)
    again = quantize_kernel(kernel_of(leaves, np.float32), name)
    np.testing.assert_allclose(
        kernel_of(again, np.float32), kernel_of(leaves, np.float32), rtol=1e-6
    )


@pytest.mark.parametrize("name", FORMATS)
def test_a_zero_column_stays_zero(name):
    kernel = random_kernel()
    kernel[:, 3] = 0
    assert not kernel_of(quantize_kernel(kernel, name), np.float32)[:, 3].any()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [192, 80])
def test_jax_dequantises_as_numpy_does_bit_for_bit(name, dtype, rows):
    leaves = quantize_kernel(random_kernel(rows), name)
    on_device = jax.jit(lambda leaves: kernel_of(leaves, dtype))(
        jax.tree.map(jnp.asarray, leaves)
    )
    np.testing.assert_array_equal(on_device, kernel_of(leaves, np.dtype(dtype)))
    assert kernel_shape(leaves) == (rows, 40)


def test_nf4_is_looked_up_without_a_gather():
    leaves = jax.tree.map(jnp.asarray, quantize_kernel(random_kernel(), "nf4"))
    text = jax.jit(lambda x: kernel_of(x, jnp.bfloat16)).lower(leaves).as_text()
    assert "gather" not in text
    assert "dynamic_slice" not in text


def test_nf4_of_an_odd_number_of_rows_is_refused(tmp_path):
    config = TINY | {"intermediate_size": 25}
    hf = write_hf(tmp_path / "hf", config, tensors(config))
    with pytest.raises(UnsupportedError, match=r"down_proj/kernel: nf4 .* 25 inputs"):
        write_base(open_model(str(hf)), tmp_path / "out", "keep", False, "nf4")
    assert not (tmp_path / "out").exists()


def layer_gradients(leaves: dict[str, Any], x: jax.Array) -> Any:
    layer = LoRADense(40)
    adapter = {
        "lora_A": jnp.asarray(random_kernel(192, 4)),
        "lora_B": jnp.asarray(random_kernel(4, 40)),
    }

    def loss(x, adapter):
        params = {**leaves, **adapter, "lora_scaling": jnp.float32(2)}
        return jnp.sum(jnp.sin(layer.apply({"params": params}, x)))  # type: ignore[arg-type]

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, adapter)


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_are_those_through_the_dequantised_kernel(name):
    leaves = jax.tree.map(jnp.asarray, quantize_kernel(random_kernel(), name))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 5, 192)), jnp.float32)
    quantised = layer_gradients(leaves, x)
    plain = layer_gradients({"kernel": kernel_of(leaves, jnp.float32)}, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        quantised,
        plain,
    )


def test_a_table_of_bytes_gives_the_same_bits():
    leaves = jax.tree.map(jnp.asarray, quantize_kernel(random_kernel(), "nf4"))
    one, other = (
        kernel_of(leaves, jnp.float32, has_fast_gather=fast) for fast in (False, True)
    )
    np.testing.assert_array_equal(one, other)


def quantised_params(name: Format, config: Any) -> tuple[Any, Any]:
    """Returns a model's params with quantised projections, and with those dequantised."""

    def visit(tree: Any, change: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        if "kernel" in tree:
            rest = {k: v for k, v in tree.items() if k != "kernel"}
            return rest | change(np.asarray(tree["kernel"]))
        return {k: visit(v, change) for k, v in tree.items()}

    def quantise(kernel: np.ndarray) -> Any:
        return jax.tree.map(jnp.asarray, quantize_kernel(kernel, name))

    def dequantise(kernel: np.ndarray) -> Any:
        return {"kernel": kernel_of(quantise(kernel), jnp.float32)}

    params = random_params(config)
    stored, plain = (visit(params["layers"], f) for f in (quantise, dequantise))
    return {**params, "layers": stored}, {**params, "layers": plain}


@pytest.mark.parametrize("name", FORMATS)
def test_logits_count_and_merge_are_those_of_the_dequantised_model(name):
    config = llama_config(num_hidden_layers=1)
    stored, plain = (
        add_lora(p, ALL_LINEAR, jax.random.key(1))
        for p in quantised_params(name, config)
    )
    assert count_parameters(stored) == count_parameters(plain)
    assert not trainable_mask(stored)["layers"]["0"]["mlp"]["up_proj"]["kernel_q"]
    model, tokens = Llama(config), random_tokens(2, 6)
    expected = logits_of(model, plain, tokens)
    np.testing.assert_allclose(logits_of(model, stored, tokens), expected, atol=1e-5)
    merged, expected = merge(stored), merge(plain)
    assert jax.tree.structure(merged) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, merged, expected)


@pytest.mark.parametrize(
    ("name", "remat"),
    [("fp8", "none"), ("int8", "minimal"), ("nf4", "full"), ("nf4", "offload")],
)
def test_training_follows_the_dequantised_model_and_leaves_the_base(name, remat):
    config = llama_config(num_hidden_layers=1)
    stored, plain = (
        add_lora(p, ALL_LINEAR, jax.random.key(1))
        for p in quantised_params(name, config)
    )
    quantised = Run(config=config, params=stored, remat=remat)
    before = jax.tree.map(np.array, quantised.frozen)
    expected = Run(config=config, params=plain, remat=remat).train(3)
    found = quantised.train(3)
    for a, b in zip(found, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    jax.tree.map(np.testing.assert_array_equal, quantised.frozen, before)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("nf4", {"use_dora": True}),
        ("int8", {"init_lora_weights": "pissa"}),
        ("fp8", {"init_lora_weights": "olora"}),
        ("nf4", {"modules_to_save": ["down_proj", "lm_head", "embed_tokens"]}),
        ("int8", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ("fp8", {"trainable_token_indices": [1, 3]}),
    ],
)
def test_every_kind_of_adapter_trains_as_on_the_dequantised_model(name, settings):
    config = llama_config(num_hidden_layers=1)
    lora = LoraConfig(r=4, **({"target_modules": ["q_proj"]} | settings))
    stored, plain = (
        Run(config=config, params=add_lora(params, lora, jax.random.key(1)))
        for params in quantised_params(name, config)
    )
    before = jax.tree.map(np.array, stored.frozen)
    for a, b in zip(stored.train(2), plain.train(2), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    jax.tree.map(np.testing.assert_array_equal, stored.frozen, before)


@pytest.mark.parametrize("name", ["dora", "pissa", "modules_to_save", "tied_lm_head"])
def test_an_adapter_of_peft_on_a_quantised_base_is_used_and_merged(name, tmp_path):
    case = golden(name)
    base = str(tmp_path / "base")
    write_base(open_model(str(case.base)), Path(base), "keep", False, "nf4")
    (model, stored), (_, plain) = (
        convert.load(base, str(case.folder), dtype) for dtype in ("keep", "float32")
    )
    assert "kernel_q" in stored["layers"]["0"]["mlp"]["up_proj"]
    np.testing.assert_allclose(
        logits_of(model, stored, case.tokens),
        logits_of(model, plain, case.tokens),
        atol=1e-5,
    )
    words = [str(tmp_path / "merged"), "--model", base, "--adapter", str(case.folder)]
    # It verifies: base and adapter, merged in memory, and the files give the same logits.
    assert not run_command(to_hf.main, to_hf.Arguments, argv=words)


def test_the_plan_counts_the_weights_that_are_dequantised():
    config = llama_config(num_hidden_layers=2)
    stored, plain = quantised_params("nf4", config)
    work = Workload(
        config=config,
        rows=64,
        length=64,
        context=1,
        fsdp=1,
        tensor=1,
        devices=1,
        compute=Compute("gpu", jnp.dtype(jnp.bfloat16), remat="minimal"),
    )
    kernels = sorted(
        2 * leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(plain["layers"])
        if path[-1].key == "kernel"
    )
    part = "one layer, or logits"
    found, before = (memory_bytes(params, work)[part] for params in (stored, plain))
    assert found - before == sum(kernels[-3:])


WIDE = TINY | {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4}
MESHES = [(1, 4, 1), (1, 1, 2), (2, 2, 2)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide") / "hf"
    rng = np.random.default_rng(0)
    arrays = {
        key: (0.1 * rng.standard_normal(array.shape)).astype(ml_dtypes.bfloat16)
        for key, array in tensors(WIDE).items()
    }
    return write_hf(folder, WIDE, arrays)


@pytest.fixture(scope="module")
def bases(wide, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    for name in FORMATS:
        write_base(open_model(str(wide)), folder / name, "keep", False, name)
    return {name: folder / name for name in FORMATS}


def equal(a: Any, b: Any) -> bool:
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    return jax.tree.all(same)


@pytest.mark.parametrize("name", FORMATS)
def test_converting_then_loading_equals_quantising_while_loading(wide, bases, name):
    loaded = load_params(open_model(str(bases[name])))
    assert equal(loaded, load_params(open_model(str(wide)), dtype=name))
    shapes = abstract_params(open_model(str(wide)), dtype=name)
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), loaded, shapes
        )
    )
    assert loaded["lm_head"]["kernel"].dtype == jnp.bfloat16


@functools.cache
def loaded_on_one_device(path: Path, name: Any) -> tuple[Any, np.ndarray]:
    source = open_model(str(path))
    params = load_params(source, dtype=name)
    return params, logits_of(Llama(source.config), params, random_tokens(4, 6) % 20)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("converted", [False, True])
def test_a_quantised_model_on_a_mesh_equals_that_on_one_device(
    wide, bases, name, mesh, converted
):
    size = int(np.prod(mesh))
    devices = make_mesh(MeshConfig(*mesh), jax.devices()[:size])
    path = bases[name] if converted else wide
    source = open_model(str(path))

    def sharding(path, _):
        return parameter_sharding(devices, tuple(path.split("/")))

    placed = load_params(source, dtype=name, sharding=sharding)
    expected, expected_logits = loaded_on_one_device(path, name)
    assert equal(placed, expected)
    leaf = placed["layers"]["0"]["mlp"]["down_proj"]["kernel_q"]
    cut = mesh[1] * mesh[2]
    assert leaf.addressable_shards[0].data.size * cut == leaf.size
    logits = logits_of(Llama(source.config), placed, random_tokens(4, 6) % 20)
    np.testing.assert_allclose(logits, expected_logits, atol=1e-4)


def test_a_mesh_that_cuts_a_block_is_refused_before_reading(bases):
    devices = make_mesh(MeshConfig(1, 8, 1), jax.devices()[:8])
    source = open_model(str(bases["nf4"]))
    with pytest.raises(UsageError, match="blocks of 64 weights together"):
        load_params(
            source,
            sharding=lambda path, _: parameter_sharding(
                devices, tuple(path.split("/"))
            ),
        )


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_base_converts_again_and_can_be_dequantised(bases, tmp_path, name):
    source = open_model(str(bases[name]))
    digest = write_base(source, tmp_path / "again", "keep", False)
    assert digest == source.provenance["content_digest"]
    stored, plain = load_params(source), load_params(source, dtype="float32")
    down = stored["layers"]["1"]["mlp"]["down_proj"]
    np.testing.assert_array_equal(
        plain["layers"]["1"]["mlp"]["down_proj"]["kernel"], kernel_of(down, jnp.float32)
    )


def test_another_format_of_a_quantised_base_is_refused(bases, tmp_path):
    source = open_base(bases["nf4"])
    with pytest.raises(UsageError, match="quantised as nf4 already"):
        load_params(source, dtype="int8")
    with pytest.raises(UsageError, match="quantised as nf4 already"):
        write_base(source, tmp_path / "out", "keep", False, "fp8")


def test_description_tells_the_format_and_counts_weights(wide, bases):
    plain, text = (
        "\n".join(describe_model(open_model(str(path))))
        for path in (wide, bases["nf4"])
    )
    assert "quantised       nf4: the layers' projections" in text
    pick = [line for line in plain.splitlines() if line.startswith("parameters")]
    assert pick[0].split()[1] in text


def test_a_record_of_another_format_is_refused(bases, tmp_path):
    out = tmp_path / "out"
    write_base(open_base(bases["nf4"]), out, "keep", False)
    record = json.loads((out / "jlora.json").read_text())
    record["quantize"] = "int8"
    (out / "jlora.json").write_text(json.dumps(record))
    with pytest.raises(CorruptError, match="missing"):
        open_base(out)


@pytest.mark.parametrize(("rows", "cuts"), [(64, False), (112, True), (192, False)])
def test_a_shard_of_nf4_ends_with_a_block(rows: int, cuts: bool) -> None:
    """Each device dequantises its own rows with its own absmax."""
    spec = Spec((rows, 8), np.dtype(np.uint8))  # two rows in a byte
    assert _cuts_block("layers/0/mlp/down_proj/kernel_q", spec, (rows // 2, 8)) is cuts
    assert not _cuts_block("layers/0/mlp/down_proj/kernel_q", spec, (rows, 4))
