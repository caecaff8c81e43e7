import os

import ml_dtypes
import numpy as np
import pytest
from helpers.tiny import CONFIG, tensors, write_hf

from jlora.errors import CorruptError
from jlora.formats import array_blocks as blocks
from jlora.formats.array_blocks import read_box, transposed_blocks, whole
from jlora.formats.load_params import load_params
from jlora.formats.open_model import open_model
from jlora.formats.safetensors_file import Entry
from jlora.formats.tensor_checks import first_non_finite, is_finite

SHAPE = (700, 300)


@pytest.fixture
def stored(tmp_path):
    """A file of 5 bytes and a matrix, and the matrix."""
    array = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    (tmp_path / "file").write_bytes(b"other" + array.tobytes())
    return tmp_path / "file", array


def accept(block, first):
    """Finds nothing wrong with a block."""


def read(file, *, transposed, dtype=np.float32):
    entry = Entry(SHAPE, np.dtype(dtype), file, 5)
    return read_box(entry, whole(SHAPE), transposed=transposed, check=accept)


@pytest.mark.parametrize("most", [1 << 30, 1000, 7])
def test_reads_that_end_early_are_taken_up_again(stored, monkeypatch, most):
    file, array = stored
    real = os.preadv

    def early(descriptor, views, offset):
        views, left = list(views), most
        taken = []
        for view in views:
            taken.append(view[: max(0, left)])
            left -= len(view)
        return real(descriptor, [view for view in taken if len(view)], offset)

    monkeypatch.setattr(os, "preadv", early)
    assert np.array_equal(read(file, transposed=True), array.T)
    assert np.array_equal(read(file, transposed=False), array)


@pytest.mark.parametrize("transposed", [True, False])
def test_a_file_that_ends_before_is_told(stored, transposed):
    file, array = stored
    os.truncate(file, 5 + array.nbytes - 1)
    with pytest.raises(CorruptError, match="cut while it was read"):
        read(file, transposed=transposed)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_a_file_that_becomes_shorter_after_its_header_was_read_is_told(tmp_path, kept):
    folder = write_hf(tmp_path / "model", CONFIG, tensors(CONFIG))
    source = open_model(str(folder))
    path = folder / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * kept))
    with pytest.raises(CorruptError, match="cut while it was read"):
        load_params(source)


@pytest.mark.parametrize("rows", [1, 64, 640])
@pytest.mark.parametrize("dtype", ["u1", ml_dtypes.bfloat16, "u4", "u8"])
def test_blocks_of_any_size_give_the_transpose(monkeypatch, rows, dtype):
    monkeypatch.setattr(blocks, "BLOCK_ROWS", rows)
    bits = np.random.default_rng(0).bytes(
        SHAPE[0] * SHAPE[1] * np.dtype(dtype).itemsize
    )
    array = np.frombuffer(bits, dtype).reshape(SHAPE)
    target = np.empty(SHAPE[::-1], array.dtype)
    blocks.transpose_into(target, array)
    assert target.tobytes() == array.T.tobytes()


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("row_bytes", [0, 2, 8192, 28672, 1 << 20, 1 << 30])
@pytest.mark.parametrize("rows", [0, 1, 31, 640, 641, 14336])
def test_threads_get_as_many_blocks_of_whole_cache_lines(
    monkeypatch, rows, row_bytes, threads
):
    monkeypatch.setattr(blocks, "THREADS", threads)
    found = list(transposed_blocks(5, 5 + rows, row_bytes))
    assert [i for first, end in found for i in range(first, end)] == list(
        range(5, 5 + rows)
    )
    sizes = [end - first for first, end in found]
    assert max(sizes, default=0) <= blocks.BLOCK_ROWS
    assert all(size <= 32 or size * row_bytes < 16 << 20 for size in sizes)
    assert all((first - 5) % 32 == 0 for first, _ in found)
    assert len(found) % threads == 0 or max(sizes) <= 32
    assert max(sizes, default=0) <= min(sizes[:-1], default=640) + 32


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_finiteness_is_right_for_every_pattern_of_16_bits(dtype):
    values = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    found = [is_finite(values[i : i + 1]) for i in range(len(values))]
    with np.errstate(invalid="ignore"):
        assert np.array_equal(found, np.isfinite(values))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_finiteness_is_right_at_its_borders(dtype, sign):
    largest = dtype(sign) * np.finfo(dtype).max
    assert is_finite(np.array([largest, -0.0, 0.0, np.finfo(dtype).tiny], dtype))
    for value in (dtype(sign) * dtype(np.inf), np.copysign(dtype(np.nan), sign)):
        assert not is_finite(np.array([0, value], dtype))


def test_the_first_index_is_told_in_row_major_order_whatever_the_layout():
    array = np.zeros((3, 4), np.float32)
    array[1, 3] = array[2, 0] = np.nan
    assert first_non_finite(array) == first_non_finite(np.asfortranarray(array))
    assert first_non_finite(array) == (1, 3)
    assert first_non_finite(array[:, :3]) == (2, 0)
    assert first_non_finite(array[:0]) is None


@pytest.mark.parametrize("share", [640, 4096, 32 << 20])
def test_matrices_of_one_shape_and_of_others_in_turn_keep_their_values(
    tmp_path, monkeypatch, share
):
    monkeypatch.setattr(blocks, "_TOUCHED_BYTES", share)
    rng = np.random.default_rng(0)
    for name, shape in enumerate([(1100, 30), (1100, 30), (40, 70), (1100, 30)]):
        array = rng.normal(size=shape).astype(np.float32)
        file = tmp_path / str(name)
        file.write_bytes(array.tobytes())
        entry = Entry(shape, array.dtype, file, 0)
        found = read_box(entry, whole(shape), transposed=True, check=accept)
        assert np.array_equal(found, array.T)


@pytest.mark.parametrize("start", [0, 64, 4096 * 7 + 64])
@pytest.mark.parametrize("size", [1, 5000, 5 << 20])
def test_touching_comes_to_every_page_of_new_memory_and_to_no_other(start, size):
    memory = np.ones(start + size + 4096, np.uint8)
    blocks.touch(memory[start : start + size])
    written = np.flatnonzero(memory == 0)
    assert start <= written.min() <= written.max() < start + size
    first = memory.ctypes.data
    pages = set((first + written) // 4096)
    assert pages >= set(range((first + start) // 4096, (first + start + size) // 4096))
