"""Block formats of GGUF, decoded one number at a time: the reference of the tests.

Shares no code with the gguf package. Source: ggml-common.h (layouts) and the
`dequantize_row_*` functions of ggml-quants.c, restated with Python integers.
"""

from collections.abc import Callable, Sequence

import numpy as np

Block = Sequence[int]


def half(block: Block, at: int) -> float:
    """Returns the float16 at a byte offset."""
    return float(np.frombuffer(bytes(block[at : at + 2]), np.float16)[0])


def signed(byte: int) -> int:
    """Returns a byte as an int8."""
    return byte - 256 if byte > 127 else byte


def q4_0(b: Block) -> list[float]:
    """32 weights: scale, 16 bytes of two nibbles each, first and second half."""
    d = half(b, 0)
    return [((b[2 + j] & 15) - 8) * d for j in range(16)] + [
        ((b[2 + j] >> 4) - 8) * d for j in range(16)
    ]


def q4_1(b: Block) -> list[float]:
    """As Q4_0, from a minimum upwards."""
    d, m = half(b, 0), half(b, 2)
    return [(b[4 + j] & 15) * d + m for j in range(16)] + [
        (b[4 + j] >> 4) * d + m for j in range(16)
    ]


def fifth_bits(b: Block, at: int) -> list[int]:
    """Returns 32 bits, one per weight."""
    word = int.from_bytes(bytes(b[at : at + 4]), "little")
    return [(word >> j) & 1 for j in range(32)]


def q5_0(b: Block) -> list[float]:
    """As Q4_0, with a fifth bit per weight."""
    d, high = half(b, 0), fifth_bits(b, 2)
    low = [b[6 + j] & 15 for j in range(16)] + [b[6 + j] >> 4 for j in range(16)]
    return [(low[j] + 16 * high[j] - 16) * d for j in range(32)]


def q5_1(b: Block) -> list[float]:
    """As Q4_1, with a fifth bit per weight."""
    d, m, high = half(b, 0), half(b, 2), fifth_bits(b, 4)
    low = [b[8 + j] & 15 for j in range(16)] + [b[8 + j] >> 4 for j in range(16)]
    return [(low[j] + 16 * high[j]) * d + m for j in range(32)]


def q8_0(b: Block) -> list[float]:
    """32 weights: scale, 32 int8."""
    return [signed(b[2 + j]) * half(b, 0) for j in range(32)]


def scale_and_minimum(b: Block, j: int) -> tuple[int, int]:
    """Returns the 6-bit scale and minimum of the j-th 32 weights of a K block."""
    s = b[4:16]
    if j < 4:
        return s[j] & 63, s[j + 4] & 63
    return (
        (s[j + 4] & 15) | ((s[j - 4] >> 6) << 4),
        (s[j + 4] >> 4) | ((s[j] >> 6) << 4),
    )


def q4_k(b: Block) -> list[float]:
    """256 weights in 8 groups, each with its own scale and minimum."""
    d, m = half(b, 0), half(b, 2)
    result = []
    for group in range(8):
        scale, minimum = scale_and_minimum(b, group)
        for j in range(32):
            byte = b[16 + 32 * (group // 2) + j]
            nibble = byte >> 4 if group % 2 else byte & 15
            result.append(d * scale * nibble - m * minimum)
    return result


def q5_k(b: Block) -> list[float]:
    """As Q4_K, with a fifth bit per weight: bit `group` of one of 32 bytes."""
    d, m = half(b, 0), half(b, 2)
    result = []
    for group in range(8):
        scale, minimum = scale_and_minimum(b, group)
        for j in range(32):
            byte = b[48 + 32 * (group // 2) + j]
            value = (byte >> 4 if group % 2 else byte & 15) + 16 * (
                (b[16 + j] >> group) & 1
            )
            result.append(d * scale * value - m * minimum)
    return result


def q6_k(b: Block) -> list[float]:
    """256 weights of 6 bits: 4 in ql, 2 in qh; 16 int8 scales; one float16."""
    d = half(b, 208)
    result = [0.0] * 256
    for part in range(2):
        for j in range(32):
            high = b[128 + 32 * part + j]
            for quarter in range(4):
                byte = b[64 * part + j + 32 * (quarter % 2)]
                low = byte >> 4 if quarter >= 2 else byte & 15
                value = (low | (((high >> (2 * quarter)) & 3) << 4)) - 32
                scale = signed(b[192 + 8 * part + 2 * quarter + j // 16])
                result[128 * part + 32 * quarter + j] = d * scale * value
    return result


# Name -> (weights in a block, bytes, offsets of its float16 numbers, decoder).
FORMATS: dict[str, tuple[int, int, tuple[int, ...], Callable[[Block], list[float]]]] = {
    "Q4_0": (32, 18, (0,), q4_0),
    "Q4_1": (32, 20, (0, 2), q4_1),
    "Q5_0": (32, 22, (0,), q5_0),
    "Q5_1": (32, 24, (0, 2), q5_1),
    "Q8_0": (32, 34, (0,), q8_0),
    "Q4_K": (256, 144, (0, 2), q4_k),
    "Q5_K": (256, 176, (0, 2), q5_k),
    "Q6_K": (256, 210, (208,), q6_k),
}


def random_blocks(name: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Returns rows of random blocks, uint8, whose scales are ordinary numbers."""
    weights, size, halves, _ = FORMATS[name]
    rng = np.random.default_rng(seed)
    count = rows * columns // weights
    blocks = rng.integers(0, 256, (count, size), np.uint8)
    for at in halves:
        numbers = rng.uniform(-0.1, 0.1, count).astype(np.float16)
        blocks[:, at : at + 2] = numbers.view(np.uint8).reshape(count, 2)
    return blocks.reshape(rows, -1)


def decode(name: str, rows: np.ndarray) -> np.ndarray:
    """Returns the weights of rows of blocks, float64."""
    size, decoder = FORMATS[name][1], FORMATS[name][3]
    return np.array(
        [
            [
                value
                for block in row.reshape(-1, size).tolist()
                for value in decoder(block)
            ]
            for row in rows
        ]
    )
