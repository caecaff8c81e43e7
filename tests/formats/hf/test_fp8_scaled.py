import jax
import ml_dtypes
import numpy as np
import pytest
from helpers.quantized_files import (
    FP8,
    compressed,
    dequantized_fp8,
    fp8_model,
)
from helpers.tiny import Q_PROJ, write_hf

from jlora.errors import CorruptError, UnsupportedError
from jlora.formats.base.base_writer import write_base
from jlora.formats.load_params import load_params
from jlora.formats.open_model import open_model

BLOCK = (48, 40)  # the last block of a weight [64, 64] is smaller on both sides
BLOCKS = (FP8 | {"weight_block_size": list(BLOCK)}, BLOCK, "weight_scale_inv")
ROWS = (compressed("channel"), (1, 10**6), "weight_scale")
WHOLE = (compressed("tensor"), (10**6, 10**6), "weight_scale")
STATIC = (FP8 | {"weight_block_size": None}, (10**6, 10**6), "weight_scale_inv")
IN_BLOCKS = (compressed("block", block_structure=list(BLOCK)), BLOCK, "weight_scale")
CASES = [BLOCKS, ROWS, WHOLE, STATIC, IN_BLOCKS]
SCALE = Q_PROJ.replace("weight", "weight_scale_inv")


def expected_weight(arrays, key: str, block, name: str) -> np.ndarray:
    scales = arrays[key.removesuffix("weight") + name]
    return dequantized_fp8(arrays[key], scales.astype(np.float32), block).T


def leaves(params):
    return params["layers"]["0"]["self_attn"]["q_proj"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["keep", "bfloat16", "float32"])
def test_weights_are_read_in_the_dtype_that_they_stand_for(tmp_path, case, dtype):
    config, arrays = fp8_model(case[1], case[2], case[0])
    source = open_model(str(write_hf(tmp_path / "fp8", config, arrays)))
    found = np.asarray(leaves(load_params(source, dtype=dtype))["kernel"])
    expected = expected_weight(arrays, Q_PROJ, *case[1:])
    target = ml_dtypes.bfloat16 if dtype == "keep" else np.dtype(dtype)
    np.testing.assert_array_equal(found, expected.astype(target))


@pytest.mark.parametrize("case", [ROWS, WHOLE, STATIC])
def test_codes_and_scales_are_those_of_the_file_on_request(tmp_path, case):
    config, arrays = fp8_model(case[1], case[2], case[0])
    source = open_model(str(write_hf(tmp_path / "fp8", config, arrays)))
    write_base(source, tmp_path / "base", "keep", False, "fp8")
    for opened in (source, open_model(str(tmp_path / "base"))):
        own = leaves(load_params(opened, dtype="fp8"))
        np.testing.assert_array_equal(own["kernel_q"], arrays[Q_PROJ].T)
        scales = arrays[Q_PROJ.removesuffix("weight") + case[2]]
        expected = np.broadcast_to(scales.ravel(), (64,))
        np.testing.assert_array_equal(own["kernel_scale"], expected)


def test_modules_that_the_checkpoint_leaves_plain_are_quantised_on_request(tmp_path):
    config, arrays = fp8_model(ROWS[1], ROWS[2], ROWS[0])
    weight = dequantized_fp8(
        arrays[Q_PROJ], arrays.pop(Q_PROJ.replace("weight", ROWS[2])), ROWS[1]
    )
    arrays[Q_PROJ] = weight.astype(ml_dtypes.bfloat16)
    source = open_model(str(write_hf(tmp_path / "fp8", config, arrays)))
    plain = leaves(load_params(source))["kernel"]
    np.testing.assert_array_equal(np.asarray(plain), arrays[Q_PROJ].T)
    own = leaves(load_params(source, dtype="fp8"))
    assert set(own) == {"kernel_q", "kernel_scale"}


@pytest.mark.parametrize("dtype", ["fp8", "int8", "nf4"])
def test_blocks_are_quantised_again_on_request(tmp_path, dtype):
    config, arrays = fp8_model(BLOCK, settings=BLOCKS[0])
    source = open_model(str(write_hf(tmp_path / "fp8", config, arrays)))
    write_base(source, tmp_path / "plain", "float32", False)
    plain = open_model(str(tmp_path / "plain"))
    found, expected = (load_params(x, dtype=dtype)["layers"] for x in (source, plain))
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_scales_may_be_stored_in_half_precision_and_without_a_second_axis(
    tmp_path, dtype
):
    config, arrays = fp8_model(ROWS[1], ROWS[2], ROWS[0])
    arrays = {
        key: array.astype(dtype).ravel() if key.endswith("scale") else array
        for key, array in arrays.items()
    }
    arrays[Q_PROJ.replace("weight", "input_scale")] = np.ones((1,), np.float32)
    source = open_model(str(write_hf(tmp_path / "fp8", config, arrays)))
    found = np.asarray(leaves(load_params(source, dtype="float32"))["kernel"])
    key = Q_PROJ.replace("weight", "weight_scale")
    arrays[key] = arrays[key].reshape(-1, 1)
    np.testing.assert_array_equal(found, expected_weight(arrays, Q_PROJ, *ROWS[1:]))


def nan_code(array: np.ndarray) -> np.ndarray:
    array.view(np.uint8)[2, 3] = 0xFF
    return array


def at(index, value: float):
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (SCALE, None, "weight_scale_inv', a part of a quantised weight, is missing"),
        (SCALE, at((1, 0), np.nan), r"nan at \[1, 0\] is no scale"),
        (SCALE, at((1, 0), np.inf), r"inf at \[1, 0\] is no scale"),
        (SCALE, at((1, 0), -1), r"-1.0 at \[1, 0\] is no scale"),
        (SCALE, at((1, 0), 1e38), "is no scale"),
        (SCALE, lambda x: x[:1], r"float32 \[1, 2\] instead of float32 \[2, 2\]"),
        (SCALE, lambda x: x.astype(np.int8), "int8 .* instead of float32"),
        (Q_PROJ, nan_code, r"q_proj.weight': nan at \[2, 3\]"),
        (Q_PROJ, lambda x: x.view(np.uint8), r"uint8 \[64, 64\] is no weight in fp8"),
        (Q_PROJ, lambda x: x.ravel(), r"\[4096\] is no weight in fp8"),
        (Q_PROJ, lambda x: x.astype(np.float32), "1 unexpected: .*weight_scale_inv"),
    ],
)
def test_damaged_model_is_one_message(tmp_path, name, change, message):
    config, arrays = fp8_model(BLOCK, settings=BLOCKS[0])
    if change is None:
        del arrays[name]
    else:
        arrays[name] = np.ascontiguousarray(change(arrays[name].copy()))
    with pytest.raises(CorruptError, match=message) as error:
        load_params(open_model(str(write_hf(tmp_path / "fp8", config, arrays))))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (FP8 | {"fmt": "e5m2"}, "by fp8 with fmt='e5m2'"),
        (FP8 | {"weight_block_size": [128]}, r"blocks of \[128\]"),
        (FP8 | {"weight_block_size": [128, 0]}, r"blocks of \[128, 0\]"),
        (compressed("group"), "with strategy='group'"),
        (compressed("channel", num_bits=4), "num_bits=4"),
        (compressed("channel", type="int"), "type='int'"),
        (
            compressed("channel") | {"format": "pack-quantized"},
            "format='pack-quantized'",
        ),
        (
            compressed("channel") | {"kv_cache_scheme": {"num_bits": 8}},
            "kv_cache_scheme",
        ),
        (compressed("channel") | {"config_groups": {}}, "0 config_groups"),
        ({"quant_method": "fbgemm_fp8"}, r"quantised \(fbgemm_fp8\)"),
        ("fp8", r"quantised \(unknown method\)"),
    ],
)
def test_other_forms_are_refused_by_name(tmp_path, settings, message):
    config, arrays = fp8_model(BLOCK, settings=BLOCKS[0])
    with pytest.raises(UnsupportedError, match=message):
        open_model(
            str(
                write_hf(
                    tmp_path / "a", config | {"quantization_config": settings}, arrays
                )
            )
        )
