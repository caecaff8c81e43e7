import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.quantized_files import (
    BNB,
    QUANTIZED_CONFIG,
    absmax_of,
    bnb_model,
    codes_of,
    dequantized_nf4,
    plain_model,
)
from helpers.tiny import Q_PROJ, halves, write_hf, write_sharded
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora.errors import CorruptError, JloraError, UnsupportedError, UsageError
from jlora.formats.base.base_writer import write_base
from jlora.formats.load_params import abstract_params, load_params
from jlora.formats.open_model import open_model
from jlora.model.llama import Llama

DOWN = "model.layers.1.mlp.down_proj.weight"
STATE = f"{Q_PROJ}.quant_state.bitsandbytes__nf4"


@pytest.fixture(params=[False, True], ids=["absmax", "nested"])
def model(request, tmp_path):
    config, arrays = bnb_model(nested=request.param)
    return write_hf(tmp_path / "bnb", config, arrays), arrays


def leaves(params, key: str):
    *path, _ = key.removeprefix("model.").split(".")
    for part in path:
        params = params[part]
    return params


@pytest.mark.parametrize("dtype", ["keep", "nf4"])
def test_codes_and_absmax_are_those_of_the_file(model, dtype):
    folder, arrays = model
    params = load_params(open_model(str(folder)), dtype=dtype)
    for key in (Q_PROJ, DOWN):
        own = leaves(params, key)
        packed = np.asarray(own["kernel_q"])
        codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(
            -1, packed.shape[1]
        )
        np.testing.assert_array_equal(codes.T.ravel(), codes_of(arrays, key))
        absmax = np.asarray(own["kernel_absmax"])
        assert absmax.dtype == np.float32
        np.testing.assert_array_equal(absmax.T.ravel(), absmax_of(arrays, key))
    embedding = params["embed_tokens"]["embedding"]
    assert embedding.dtype == jnp.bfloat16
    expected = arrays["model.embed_tokens.weight"]
    np.testing.assert_array_equal(np.asarray(embedding), expected)


def logits(params, config) -> np.ndarray:
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    with jax.default_matmul_precision("highest"):
        found = jax.jit(Llama(config).apply)({"params": params}, tokens)
    return np.asarray(found)


def test_logits_equal_those_of_the_dequantised_weights(model, tmp_path):
    folder, arrays = model
    source = open_model(str(folder))
    expected = open_model(
        str(write_hf(tmp_path / "plain", *plain_model(*bnb(folder), arrays)))
    )
    wanted = logits(load_params(expected), expected.config)
    for dtype in ("keep", "float32"):
        np.testing.assert_array_equal(
            logits(load_params(source, dtype=dtype), source.config), wanted
        )


def bnb(folder):
    return (json.loads((folder / "config.json").read_text()),)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_dequantised_and_rounded_once(model, dtype):
    folder, arrays = model
    params = load_params(open_model(str(folder)), dtype=dtype)
    for key in (Q_PROJ, DOWN):
        expected = dequantized_nf4(arrays, key).T.astype(jnp.dtype(dtype))
        np.testing.assert_array_equal(
            np.asarray(leaves(params, key)["kernel"]), expected
        )


def test_base_holds_the_same_as_the_folder(model, tmp_path):
    folder, _ = model
    source = open_model(str(folder))
    write_base(source, tmp_path / "base", "keep", False)
    base = open_model(str(tmp_path / "base"))
    assert (base.quantize, base.held) == ("nf4", source.held)
    for dtype in ("keep", "bfloat16"):
        found, expected = (load_params(x, dtype=dtype) for x in (base, source))
        assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
    # Quantising again what was dequantised gives the same codes.
    write_base(source, tmp_path / "plain", "float32", False)
    again = load_params(open_model(str(tmp_path / "plain")), dtype="nf4")
    own, expected = (leaves(x, Q_PROJ) for x in (again, load_params(source)))
    np.testing.assert_array_equal(own["kernel_q"], expected["kernel_q"])


def test_skipped_modules_stay_plain(tmp_path):
    config, arrays = bnb_model(plain=("layers.0.mlp", "layers.1.self_attn.q_proj"))
    source = open_model(str(write_hf(tmp_path / "bnb", config, arrays)))
    write_base(source, tmp_path / "base", "keep", False)
    for opened in (source, open_model(str(tmp_path / "base"))):
        params = load_params(opened)
        assert list(leaves(params, "layers.0.mlp.up_proj.weight")) == ["kernel"]
        assert set(leaves(params, Q_PROJ)) == {"kernel_q", "kernel_absmax"}
        shapes = abstract_params(opened)
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    expected = open_model(
        str(write_hf(tmp_path / "plain", *plain_model(config, arrays)))
    )
    found = load_params(source, dtype="float32")
    np.testing.assert_array_equal(
        logits(found, source.config), logits(load_params(expected), source.config)
    )


def test_shards_of_a_mesh_are_the_same(model):
    folder, _ = model
    source = open_model(str(folder))
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "tensor"))

    def sharding(path, shape):
        if len(shape) != 2:
            return NamedSharding(mesh, PartitionSpec())
        # Half of the 64 rows would cut a block, half of down_proj's 128 ends with one.
        rows = "fsdp" if path.startswith("layers/") and "down_proj" in path else None
        return NamedSharding(mesh, PartitionSpec(rows, "tensor"))

    found = load_params(source, sharding=sharding)
    codes = found["layers"]["0"]["mlp"]["down_proj"]["kernel_q"]
    assert codes.addressable_shards[0].data.shape == (32, 32)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, load_params(source)))


def test_shards_with_an_index_and_other_storage_are_read(model, tmp_path):
    folder, arrays = model
    (config,) = bnb(folder)
    stored = {
        key: array.reshape(-1, 2).view(ml_dtypes.bfloat16)
        if key in (Q_PROJ,)
        else array
        for key, array in arrays.items()
    }
    sharded = write_sharded(tmp_path / "sharded", config, halves(stored))
    found, expected = (load_params(open_model(str(x))) for x in (sharded, folder))
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


def test_another_format_of_it_is_a_usage_error(model):
    with pytest.raises(UsageError, match="quantised as nf4 already, and cannot become"):
        load_params(open_model(str(model[0])), dtype="int8")


def state(**changes):
    def change(arrays) -> None:
        document = json.loads(arrays[STATE].tobytes()) | changes
        arrays[STATE] = np.frombuffer(json.dumps(document).encode(), np.uint8)

    return change


def without(name: str):
    return lambda arrays: arrays.pop(name)


def changed(name: str, change):
    def apply(arrays) -> None:
        arrays[name] = np.ascontiguousarray(change(arrays[name].copy()))

    return apply


def put(index: int, value: float):
    def change(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            without(f"{Q_PROJ}.absmax"),
            r"absmax', a part of a quantised weight, is miss",
        ),
        (without(f"{Q_PROJ}.quant_map"), "quant_map', a part of"),
        (without(STATE), "quant_state.bitsandbytes__nf4', a part of"),
        (without(f"{Q_PROJ}.nested_absmax"), "nested_absmax', a part of"),
        (without(f"{Q_PROJ}.nested_quant_map"), "nested_quant_map', a part of"),
        (without(Q_PROJ), "q_proj.weight', a part of"),
        (changed(f"{Q_PROJ}.quant_map", put(3, 0.5)), "not the 16 values of nf4"),
        (
            changed(f"{Q_PROJ}.quant_map", lambda x: x[:8]),
            r"\[8\] instead of .* \[16\]",
        ),
        (
            changed(f"{Q_PROJ}.nested_absmax", put(0, np.nan)),
            r"nan at \[0\] is no scale",
        ),
        (changed(f"{Q_PROJ}.nested_absmax", put(0, -1)), r"-1.0 at \[0\] is no scale"),
        (changed(f"{Q_PROJ}.nested_quant_map", lambda x: x * np.inf), "not finite"),
        (
            changed(f"{Q_PROJ}.absmax", lambda x: x[1:]),
            r"uint8 \[63\] instead of uint8",
        ),
        (changed(f"{Q_PROJ}.absmax", lambda x: x.astype("f4")), "float32 .* uint8"),
        (changed(Q_PROJ, lambda x: x[:-1]), "2,047 bytes instead of 2,048"),
        (state(shape=[64]), "describes no nf4"),
        (state(shape=[2**70, 64]), "describes no nf4"),
        (state(dtype="int8"), "describes no nf4"),
        (state(quant_type="fp4"), "describes no nf4"),
        (state(shape=[32, 128]), "of another shape"),
        (state(nested_blocksize=0), "nested_blocksize=0"),
        (state(nested_offset="x"), "nested_offset='x'"),
        (state(nested_offset=1e300), "nested_offset=1e"),
        (state(nested_blocksize=2**40), "nested_blocksize=1099511627776"),
        (state(dtype=[]), "describes no nf4"),
        (changed(STATE, lambda x: x[:-1]), "not a JSON|JSON"),
    ],
)
def test_damaged_model_is_one_message(tmp_path, damage, message):
    config, arrays = bnb_model()
    damage(arrays)
    with pytest.raises(CorruptError, match=message) as error:
        load_params(open_model(str(write_hf(tmp_path / "bnb", config, arrays))))
    assert "\n" not in str(error.value)


def test_absmax_that_is_no_number_is_corrupt(tmp_path):
    config, arrays = bnb_model(nested=False)
    arrays[f"{Q_PROJ}.absmax"][5] = np.nan
    with pytest.raises(CorruptError, match=r"absmax': nan at \[5, 0\] is no scale"):
        load_params(open_model(str(write_hf(tmp_path / "bnb", config, arrays))))


def fp4(arrays) -> None:
    arrays[STATE.replace("nf4", "fp4")] = arrays.pop(STATE)


@pytest.mark.parametrize(
    ("settings", "damage", "message"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, None, "as fp4; jlora reads its nf4"),
        ({"load_in_4bit": False, "load_in_8bit": True}, None, "as llm_int8"),
        ({}, fp4, "stored as bitsandbytes' fp4"),
        ({}, lambda arrays: arrays.update({"x.SCB": np.zeros(4, "f4")}), "llm_int8"),
        ({}, state(blocksize=128), r"nf4 of \(64, 64\) in blocks of 128"),
        ({"quant_method": "gptq"}, None, r"quantised \(gptq\)"),
        ({"quant_method": "awq"}, None, r"quantised \(awq\)"),
    ],
)
def test_other_forms_are_refused_by_name(tmp_path, settings, damage, message):
    config, arrays = bnb_model()
    config["quantization_config"] = config["quantization_config"] | settings
    if damage:
        damage(arrays)
    with pytest.raises(UnsupportedError, match=message):
        open_model(str(write_hf(tmp_path / "bnb", config, arrays)))


def test_rows_that_hold_no_whole_blocks_are_refused(tmp_path):
    config = QUANTIZED_CONFIG | {"intermediate_size": 96}
    with pytest.raises(UnsupportedError, match=r"nf4 of \(64, 96\) in blocks of 64"):
        open_model(str(write_hf(tmp_path / "bnb", *bnb_model(config=config))))


def test_configuration_of_older_versions_and_undeclared_tensors(tmp_path):
    config, arrays = bnb_model()
    older = {
        k: v for k, v in config["quantization_config"].items() if k != "quant_method"
    }
    folder = write_hf(tmp_path / "a", config | {"quantization_config": older}, arrays)
    assert open_model(str(folder)).quantize == "nf4"
    del config["quantization_config"]
    with pytest.raises(JloraError, match="integer, fp8 or quantised tensors"):
        open_model(str(write_hf(tmp_path / "b", config, arrays)))
    shutil.rmtree(tmp_path / "b")
    plain = plain_model(config, arrays)
    left = plain[0] | {"quantization_config": BNB}
    assert open_model(str(write_hf(tmp_path / "c", left, plain[1]))).quantize == "none"
