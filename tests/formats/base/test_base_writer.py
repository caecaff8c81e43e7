import jax
import ml_dtypes
import numpy as np
import pytest
from helpers.tiny import CONFIG, EMBEDDING, Q_PROJ, tensors, write_hf, write_sharded

from jlora.errors import CorruptError, UsageError
from jlora.formats.base.base_writer import write_base
from jlora.formats.load_params import load_params
from jlora.formats.model_source import Dtype
from jlora.formats.open_model import open_model


def convert_to(hf, out, dtype: Dtype = "keep", overwrite=False):
    return write_base(open_model(str(hf)), out, dtype, overwrite)


@pytest.mark.parametrize("dtype", ["keep", "float32", "bfloat16", "float16"])
def test_base_gives_the_params_of_its_source(hf, tmp_path, dtype):
    convert_to(hf, tmp_path / "out", dtype)
    base = load_params(open_model(str(tmp_path / "out")))
    direct = load_params(open_model(str(hf)), dtype=dtype)
    equal = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), base, direct
    )
    assert jax.tree.all(equal)


def test_base_keeps_side_files_verbatim_and_the_configuration(hf, tmp_path):
    convert_to(hf, tmp_path / "out")
    source, base = open_model(str(hf)), open_model(str(tmp_path / "out"))
    assert base.files == source.files
    assert list(base.hf_config.items()) == list(source.hf_config.items())
    assert base.config == source.config


def test_base_can_be_converted_again_with_the_same_digest(hf, tmp_path):
    first = convert_to(hf, tmp_path / "out")
    assert convert_to(tmp_path / "out", tmp_path / "again") == first


def test_digest_depends_neither_on_place_nor_on_shards(tmp_path):
    arrays = tensors(CONFIG)
    one = write_hf(tmp_path / "one", CONFIG, arrays)
    keys = sorted(arrays)
    shards = [{key: arrays[key] for key in keys[i::2]} for i in range(2)]
    two = write_sharded(tmp_path / "elsewhere" / "two", CONFIG, shards)
    assert convert_to(one, tmp_path / "a") == convert_to(two, tmp_path / "b")


def test_digest_changes_with_one_bit(hf, tmp_path):
    first = convert_to(hf, tmp_path / "a")
    arrays = tensors(CONFIG, ml_dtypes.bfloat16)
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.float32)
    arrays[Q_PROJ].view(np.uint16)[0, 0] ^= 1
    write_hf(hf, CONFIG, arrays)
    assert convert_to(hf, tmp_path / "b") != first


def test_nan_leaves_no_target(tmp_path):
    arrays = tensors(CONFIG)
    arrays[EMBEDDING][1, 2] = np.nan
    hf = write_hf(tmp_path / "hf", CONFIG, arrays)
    with pytest.raises(CorruptError, match=r"at \[1, 2\]"):
        convert_to(hf, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_target_equal_to_the_source_is_refused(hf):
    with pytest.raises(UsageError, match="is or holds the source"):
        convert_to(hf, hf, overwrite=True)
