"""Checks the tensors of a file: names and shapes fit the model, no NaN or infinity."""

import numpy as np

from jlora.errors import CorruptError, listing, nearest, warn


def check_names(
    where: str,
    found: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[int, ...]],
) -> None:
    """Checks that a file has the tensors of the model, in the same shapes.

    Raises:
        CorruptError: names what is missing, unexpected or of another shape.
    """
    missing = [key for key in expected if key not in found]
    unexpected = sorted(key for key in found if key not in expected)
    shapes = [
        f"{key} {list(found[key])} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {listing(missing)}")
        if missing == ["lm_head.weight"]:
            problems[-1] += (
                " (if the output layer is the embedding, set tie_word_embeddings to "
                "true in config.json)"
            )
    if unexpected:
        hint = nearest(unexpected[0], missing)
        problems.append(f"{len(unexpected)} unexpected: {listing(unexpected)}{hint}")
    if shapes:
        problems.append(f"{len(shapes)} of another shape: {listing(shapes)}")
    if problems:
        raise CorruptError(
            f"{where}: the tensors do not fit the configuration: {'; '.join(problems)}"
        )


def check_values(array: np.ndarray, where: str) -> None:
    """Raises CorruptError if there is a NaN or an infinity; warns if a matrix is all zero."""
    index = first_non_finite(array)
    if index is not None:
        raise CorruptError(
            f"{where}: {array[index]} at {list(index)}; the file is damaged, "
            "use another copy"
        )
    if array.ndim == 2 and not array.any():
        warn(f"{where}: every value is zero")


def first_non_finite(array: np.ndarray) -> tuple[int, ...] | None:
    """Returns the index of the first NaN or infinity; None if every value is finite."""
    if is_finite(array):
        return None
    bits = np.dtype(f"u{array.itemsize}")  # np.isfinite warns of some NaNs of bfloat16
    exponent = np.array(np.inf, array.dtype).view(bits)
    bad = (array.view(bits) & exponent) == exponent
    return tuple(int(i) for i in np.unravel_index(int(bad.argmax()), array.shape))


def is_finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; makes no temporary arrays.

    Weights are below 2, so none has the highest bit of the exponent, and one pass over
    the bits is enough. Otherwise the bits are compared with those of infinity: as signed
    integers for positive values, as unsigned ones for negative values.
    """
    if not array.size:
        return True
    signed, unsigned = (np.dtype(f"{kind}{array.itemsize}") for kind in "iu")
    highest = 1 << (8 * array.itemsize - 2)
    if not int(np.bitwise_or.reduce(array.view(unsigned), axis=None)) & highest:
        return True
    infinity, minus_infinity = np.array([np.inf, -np.inf], array.dtype)
    return bool(
        array.view(signed).max() < infinity.view(signed)
        and array.view(unsigned).max() < minus_infinity.view(unsigned)
    )
