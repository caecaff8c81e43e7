import json
import pickle
import time

import pytest
from helpers.data_cases import CONFIG, GOLDEN, make_files, make_tokenizer

from jlora.data.tokenize import tokenizer_trial
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import CorruptError
from jlora.limited_process import LimitedProcess


def replace(old, new):
    return {"type": "Replace", "pattern": old, "content": new}


def sequence(*parts, name="normalizers"):
    return {"type": "Sequence", name: [*parts]}


def split(pattern):
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def template(count):
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * count
        + [{"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }


def nested(depth):
    part = {"type": "NFC"}
    for _ in range(depth):
        part = sequence(part)
    return part


A, SNOWMAN = {"String": "a"}, {"String": "\u2603"}
HOSTILE = {
    "doubling_normalizer": {"normalizer": sequence(*[replace(A, "aa")] * 40)},
    "doubling_rare": {"normalizer": sequence(*[replace(SNOWMAN, "\u2603" * 2)] * 40)},
    "doubling_regex": {"normalizer": sequence(*[replace({"Regex": "."}, "xy")] * 40)},
    "long_replacement": {"normalizer": replace(A, "b" * 10**6)},
    "prepend_20_mb": {"normalizer": {"type": "Prepend", "prepend": "a" * 20_000_000}},
    "prepend_20_kb": {"normalizer": {"type": "Prepend", "prepend": "a" * 20_000}},
    "many_prepends": {
        "normalizer": sequence(*[{"type": "Prepend", "prepend": "abc "}] * 900)
    },
    "doubling_decoder": {
        "decoder": sequence(*[replace(A, "aa")] * 40, name="decoders")
    },
    "long_decoder": {"decoder": replace(A, "b" * 10**6)},
    "post_processor": {"post_processor": template(100_000)},
    "post_processor_of_900": {"post_processor": template(2_000)},
    "deep_normalizer": {"normalizer": nested(100)},
    "wide_normalizer": {"normalizer": sequence(*[{"type": "NFC"}] * 100_000)},
    "endless_split": {"pre_tokenizer": split(r"(\w+\s?)+\$")},
    "endless_split_back": {"pre_tokenizer": split(r"(a|a)*$|((a+)+)+b")},
    "bad_split": {"pre_tokenizer": split(r"(")},
    "bad_charsmap": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    },
    "bad_charsmap_long": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "/" * 4000}
    },
    "unknown_type": {"normalizer": {"type": "Nonsense"}},
}


def files_with(changes) -> dict[str, bytes]:
    document = json.loads((GOLDEN / "bytes.json").read_text()) | changes
    return make_files() | {"tokenizer.json": json.dumps(document).encode()}


@pytest.fixture(scope="module")
def small_process():
    process = LimitedProcess(tokenizer_trial.__name__, memory_bytes=1 << 29)
    yield process
    process.close()


@pytest.fixture
def small_limits(small_process, monkeypatch):
    """Limits that hold as the real ones do, and are reached sooner."""
    monkeypatch.setattr(tokenizer_trial, "_PROCESS", small_process)
    monkeypatch.setattr(tokenizer_trial, "CPU_SECONDS", 0.5)
    tokenizer_trial.check_tokenizer.cache_clear()


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tokenizer_is_refused_soon_and_in_silence(name, capfd):
    files = files_with(HOSTILE[name])
    start = time.process_time()
    with pytest.raises(CorruptError, match=r"^tokenizer\.json: "):
        Tokenizer(files, CONFIG)
    assert time.process_time() - start < 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("small_limits")
def test_deeply_nested_json_is_refused():
    files = make_files() | {"tokenizer.json": b'{"normalizer":' * 10**5 + b"0"}
    with pytest.raises(CorruptError, match=r"^tokenizer\.json: "):
        Tokenizer(files, CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalizer": sequence(*[{"type": "NFKC"}, {"type": "Lowercase"}])},
        {
            "normalizer": sequence(
                {"type": "Prepend", "prepend": "\u2581"}, replace(A, "bc")
            )
        },
        {"normalizer": replace({"Regex": " {2,}"}, " ")},
        {"post_processor": template(1)},
        {"pre_tokenizer": split(r"\p{L}+|\p{N}{1,3}|\s+")},
    ],
)
def test_usual_tokenizer_is_used(changes):
    assert Tokenizer(files_with(changes), CONFIG).encode("sum", add_bos=False)


def test_a_worker_that_gets_a_tokenizer_does_not_try_it_again(monkeypatch):
    tokenizer = make_tokenizer()
    monkeypatch.setattr("jlora.data.tokenize.tokenizer.check_tokenizer", None)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("the sum") == tokenizer.encode("the sum")
