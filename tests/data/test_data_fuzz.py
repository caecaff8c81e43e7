"""Any content of a file gives examples and bad rows, or one error message."""

import gzip
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from helpers.data_cases import make_tokenizer
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from jlora.config.run_config import DataConfig
from jlora.data.read.data_paths import find_data_sources
from jlora.data.read.row_files import row_location
from jlora.data.read.row_formats import COLUMNS
from jlora.data.read.source_rows import open_rows
from jlora.data.tokenize.tokenize_rows import Example, tokenize_rows
from jlora.errors import JloraError

NAMES = ("chatml", "generation", "llama3", "llama2", "mistral", "zephyr", "tools")
TOKENIZERS = {name: make_tokenizer(name) for name in NAMES}
CONTROLS = ["<|im_end|>", "<|im_start|>", "<|eot_id|>", "</s>", "<s>", "<tool_call>"]
# JLORA_FUZZ=100 looks a hundred times longer, elsewhere each time.
FUZZ = settings(
    max_examples=40 * int(os.environ.get("JLORA_FUZZ", "1")),
    deadline=None,
    derandomize="JLORA_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [*CONTROLS, "", " ", "\n", "the sum", "\ud800", "\0", "\u2028", "é"]
    ),
    st.lists(st.sampled_from([*CONTROLS, "a", " ", "\n", "é"]), max_size=6).map(
        "".join
    ),
)
values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), texts, st.just(10**400)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "tool_calls", "x"]),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=8,
)
roles = st.sampled_from(["user", "assistant", "system", "tool", "assitant", ""])
turns = st.one_of(
    st.fixed_dictionaries({"role": roles, "content": st.one_of(texts, values)}),
    st.fixed_dictionaries(
        {"from": st.sampled_from(["human", "gpt", "observation", "x"]), "value": texts}
    ),
)
columns = sorted({name for names in COLUMNS.values() for name in names})
rows = st.dictionaries(
    st.sampled_from(columns), st.one_of(texts, st.lists(turns, max_size=4), values)
)
lines = st.one_of(
    rows.map(lambda row: json.dumps(row, allow_nan=True).encode()),
    st.binary(max_size=40),
    st.sampled_from(
        [b"", b"{}", b"[", b"[" * 2000, b'{"text": "a", "text": 1}', b"1e999"]
    ),
)


def read(path: Path, name: str = "chatml", **config: Any) -> tuple[list[Example], int]:
    """The examples, and how many rows the examples and problems are from."""
    examples, count = [], 0
    for source in find_data_sources(str(path)):
        row_format, chunks = open_rows(
            source,
            DataConfig(**config),
            has_template=TOKENIZERS[name].has_chat_template,
        )
        for chunk in chunks:
            found = tokenize_rows(chunk, row_format, TOKENIZERS[name])
            numbers = [e.number for e in found.examples] + [
                row.number for row in found.bad_rows
            ]
            assert sorted(numbers) == sorted(number for number, _ in chunk.rows)
            for bad_row in found.bad_rows:
                assert row_location(path, bad_row.number) in str(bad_row)
            examples += found.examples
            count += len(numbers)
    return examples, count


def expect(error: JloraError, words: str) -> None:
    message = str(error)
    assert message.strip()
    assert words in message


def written(content: bytes, suffix: str = ".jsonl") -> Path:
    path = Path(tempfile.mkdtemp()) / f"data{suffix}"
    path.write_bytes(content)
    return path


def check(examples: list[Example], name: str) -> None:
    tokenizer = TOKENIZERS[name]
    for example in examples:
        assert example.tokens.dtype == np.int32
        assert len(example.tokens) == len(example.loss_mask)
        assert not example.loss_mask[:1].any()
        assert set(example.loss_mask.tolist()) <= {0, 1}
        bos = example.tokens[:2].tolist()
        assert tokenizer.bos_id is None or bos != [tokenizer.bos_id] * 2


@FUZZ
@given(
    content=st.lists(lines, max_size=6),
    end=st.sampled_from([b"\n", b"\r\n"]),
    name=st.sampled_from(NAMES),
    format=st.sampled_from(["auto", *COLUMNS]),
)
def test_any_lines_give_examples_and_problems_or_one_message(
    content, end, name, format
):
    path = written(end.join(content))
    try:
        examples, count = read(path, name, format=format)
    except JloraError as error:
        expect(error, "")
        return
    rows = end.join(content).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert count == sum(bool(row.strip(b" \t\r")) for row in rows)
    check(examples, name)


@FUZZ
@given(
    row=st.lists(rows, min_size=1, max_size=3),
    name=st.sampled_from(NAMES),
    train_on=st.sampled_from(
        ["auto", "assistant", "last_assistant", "completion", "all"]
    ),
)
def test_any_row_is_an_example_or_bad_with_a_reason(row, name, train_on):
    path = written(b"\n".join(json.dumps(r).encode() for r in row))
    try:
        check(read(path, name, train_on=train_on)[0], name)
    except JloraError as error:
        expect(error, "")


pieces = st.sampled_from(
    [*CONTROLS, "the", " sum", "é", "\n", "x", "<|im_", "end|>", "🙂"]
)
contents = st.lists(pieces, min_size=1, max_size=5).map(
    lambda x: "a" + "".join(x) + "z"
)


@FUZZ
@given(
    said=st.lists(contents, min_size=2, max_size=6), name=st.sampled_from(NAMES[:-1])
)
def test_turn_markers_in_a_message_never_become_tokens(said, name):
    tokenizer = TOKENIZERS[name]
    said = said[: len(said) // 2 * 2]

    def examples(texts: list[str]) -> list[Example]:
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": text}
            for i, text in enumerate(texts)
        ]
        path = written(json.dumps({"messages": messages}).encode())
        return read(path, name)[0]

    found, plain = examples(said), examples(["harmless"] * len(said))
    assume(found)  # not so where an answer shares a token with what is around it

    def markers(example: Example) -> list[int]:
        return [t for t in example.tokens.tolist() if t in tokenizer.turn_ids]

    assert markers(found[0]) == markers(plain[0])
    supervised = found[0].tokens[found[0].loss_mask > 0].tolist()
    text = tokenizer.decode(supervised, skip_special=False)
    for answer in said[1::2]:
        assert answer in text


@FUZZ
@given(data=st.data(), kind=st.sampled_from([".jsonl.gz", ".jsonl.zst", ".parquet"]))
def test_a_damaged_file_is_an_error_or_gives_valid_examples(data, kind):
    content = b"".join(b'{"text": "the sum of %d"}\n' % i for i in range(50))
    if kind == ".parquet":
        path = written(b"", kind)
        table = pyarrow.table({"text": [f"the sum of {i}" for i in range(50)]})
        pyarrow.parquet.write_table(table, path)
        raw = bytearray(path.read_bytes())
    elif kind == ".jsonl.gz":
        raw = bytearray(gzip.compress(content, mtime=0))
    else:
        raw = bytearray(pyarrow.compress(content, "zstd", asbytes=True))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(raw)))
    path = written(bytes(raw[: len(raw) - cut] if cut % 2 else raw), kind)
    try:
        examples, _ = read(path, format="text")
    except JloraError as error:
        expect(error, str(path))
        return
    check(examples, "chatml")
