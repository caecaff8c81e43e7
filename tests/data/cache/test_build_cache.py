"""The token cache of a data set: when it is used, and that all cores make the same one."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from helpers import ROOT
from helpers.data_cases import (
    UNSTABLE,
    all_tokens,
    chat,
    load,
    make_tokenizer,
    write_rows,
)

import jlora.data
from jlora.data.cache import build_cache as build
from jlora.data.cache.row_counts import RowCounts
from jlora.errors import CorruptError, ResourceError, UnsupportedError

ROWS = [chat(f"What is {i}?", "five " * (1 + i % 4)) for i in range(40)]


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("JLORA_CACHE", str(tmp_path / "cache"))
    return write_rows(tmp_path / "data.jsonl", ROWS)


@pytest.fixture
def tokenised(monkeypatch) -> list[int]:
    """The rows of every chunk that was tokenised."""
    counts: list[int] = []
    make = build._tokenize

    def counted(chunk, row_format, tokenizer):
        counts.append(len(chunk.rows))
        return make(chunk, row_format, tokenizer)

    monkeypatch.setattr(build, "_tokenize", counted)
    return counts


def test_same_data_is_tokenised_once(path, tokenised):
    first, second = load(path), load(path)
    assert tokenised == [40]
    assert first.fingerprint == second.fingerprint
    np.testing.assert_equal(first.batch(0), second.batch(0))


@pytest.mark.parametrize(
    "change",
    [{"seq_len": 36}, {"packing": True}, {"seed": 3}, {"batch_size": 7}],
    ids=str,
)
def test_a_setting_that_does_not_change_the_tokens_uses_the_cache(
    path, tokenised, change
):
    load(path)
    load(path, **change)
    assert tokenised == [40]


def test_a_copy_of_the_file_uses_the_cache_and_is_named(path, tmp_path, tokenised):
    load(path)
    other = tmp_path / "other.jsonl"
    other.write_bytes(path.read_bytes())
    assert load(other).samples[0].path == other
    assert tokenised == [40]


@pytest.mark.parametrize(
    ("tokenizer", "config"),
    [
        ("chatml", {"train_on": "all"}),
        ("llama3", {}),
        ("chatml", {"format": "messages"}),
    ],
)
def test_a_setting_that_changes_the_tokens_builds_another(
    path, tokenised, tokenizer, config
):
    load(path)
    load(path, make_tokenizer(tokenizer), **config)
    assert tokenised == [40, 40]


def test_changed_data_builds_another(path, tokenised):
    load(path)
    write_rows(path, [*ROWS, chat("more", "rows")])
    assert load(path).num_records == 41
    assert tokenised == [40, 41]


def test_changed_code_of_the_library_builds_another(
    path, tmp_path, tokenised, monkeypatch
):
    assert Path(jlora.data.__file__).parent == build._CODE
    code = tmp_path / "code"
    (code / "read").mkdir(parents=True)
    monkeypatch.setattr(build, "_CODE", code)
    for text in ("a = 1", "a = 1", "a = 2"):
        (code / "read" / "rows.py").write_text(text)
        load(path)
    assert tokenised == [40, 40]


def test_cache_dir_is_where_the_store_is(path, tmp_path):
    load(path, cache_dir=str(tmp_path / "here"))
    assert (tmp_path / "here" / "tokens").is_dir()
    assert not (tmp_path / "cache").exists()


def test_a_damaged_cache_is_built_again(path, tmp_path, tokenised, capsys):
    good = all_tokens(load(path))
    [tokens] = (tmp_path / "cache").glob("tokens/*/tokens.bin")
    tokens.write_bytes(bytes(tokens.stat().st_size))
    assert all_tokens(load(path)) == good
    assert tokenised == [40, 40]
    assert "tokens.bin is damaged; building it again" in capsys.readouterr().err


def test_the_log_does_not_depend_on_the_cache(path):
    write_rows(
        path,
        [*ROWS, "{broken", {"messages": []}, {"messages": ROWS[0]["messages"][:1]}],
    )
    settings = {"on_bad_row": "skip", "seq_len": 36}
    first, second = load(path, **settings), load(path, **settings)
    assert first.summary == second.summary
    assert first.row_counts == second.row_counts


def test_progress_is_reported_in_tokens_per_second(path, monkeypatch, capsys):
    monkeypatch.setattr(build, "_REPORT_EVERY_S", -1)
    monkeypatch.setattr("jlora.data.read.row_files.CHUNK_ROWS", 25)
    tokens = load(path).num_tokens
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"tokenising {path}: 25 records, ")
    assert f": 40 records, {tokens / 1e6:,.1f}M tokens, " in last
    assert last.endswith(" tokens/s")


def test_bad_rows_are_refused_from_the_cache_too(path):
    write_rows(path, [*ROWS, "{broken"])
    messages = []
    for _ in range(2):
        with pytest.raises(CorruptError, match="line 41, column 2") as error:
            load(path)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_row_counts_survive_storing(path):
    write_rows(path, [*ROWS, "{broken"])
    [counts] = load(path, on_bad_row="skip").row_counts
    again = RowCounts.from_json(counts.to_json(), counts.source, counts.seq_len)
    assert again.to_json() == counts.to_json()


def test_a_pickled_tokenizer_encodes_the_same():
    tokenizer = make_tokenizer()
    other = copy.deepcopy(tokenizer)
    assert other is not tokenizer
    assert other.encode("What is the sum?", add_bos=True) == tokenizer.encode(
        "What is the sum?", add_bos=True
    )
    assert other.fingerprint == tokenizer.fingerprint


@pytest.fixture
def two_workers(monkeypatch):
    monkeypatch.setattr(build, "_BYTES_PER_WORKER", 1)
    monkeypatch.setattr(build.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr("jlora.data.read.row_files.CHUNK_ROWS", 7)


@pytest.mark.slow
def test_workers_make_the_same_records_in_the_same_order(path, tmp_path, two_workers):
    many = load(path, cache_dir=str(tmp_path / "many"))
    build._BYTES_PER_WORKER = 1 << 30
    one = load(path, cache_dir=str(tmp_path / "one"))
    assert many.fingerprint == one.fingerprint
    assert many.summary == one.summary


@pytest.mark.slow
def test_an_error_in_a_worker_is_the_users_message(path, two_workers):
    tokenizer = make_tokenizer(chat_template=UNSTABLE)
    with pytest.raises(UnsupportedError, match="changes earlier text"):
        load(write_rows(path, [chat("a", "b", "c", "d")] * 40), tokenizer)


def test_names_and_modules_of_the_library_load_when_asked_for():
    code = (
        "import jlora; print(jlora.merge.__name__, jlora.errors.UsageError.__name__,"
        "hasattr(jlora, 'nothing'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["merge", "UsageError", "False"]


def test_what_a_worker_imports_has_no_jax():
    code = (
        "import sys, jlora.data.cache.build_cache;"
        "print({'jax', 'flax', 'optax'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


@pytest.mark.slow
def test_workers_do_not_run_the_script_again(path, tmp_path, monkeypatch, two_workers):
    script = ModuleType("__main__")
    script.__file__ = str(tmp_path / "script.py")
    (tmp_path / "script.py").write_text("raise SystemExit('no guard')")
    monkeypatch.setitem(sys.modules, "__main__", script)
    assert load(path).num_records == 40
    assert sys.modules["__main__"] is script


KILLED = """
import sys, time
from helpers.data_cases import load
from jlora.data.cache import build_cache, token_store

def pause(self, block):
    print("building", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    build_cache._BYTES_PER_WORKER = 1
    token_store.StoreWriter.append = pause
    load(sys.argv[1])
"""


@pytest.mark.slow
def test_workers_of_a_killed_build_end(path):
    tests = str(ROOT / "tests")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{Path(tests).parent}:{tests}"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    process.kill()
    process.communicate(timeout=20)  # which all that have its output keep from ending


def die(chunk, row_format):
    os._exit(9)


@pytest.mark.slow
def test_a_worker_that_dies_is_an_error_and_leaves_nothing(
    path, tmp_path, monkeypatch, two_workers
):
    monkeypatch.setattr(build, "_work", die)
    with pytest.raises(ResourceError, match="a process that tokenises died"):
        load(path)
    assert not [p for p in (tmp_path / "cache" / "tokens").iterdir() if p.is_dir()]


def test_processes_that_tokenise_do_not_notice_ctrl_c():
    survive = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('alive')"
    with build._interrupts_blocked():
        child = subprocess.run(
            [sys.executable, "-c", survive], capture_output=True, text=True, check=False
        )
    assert (child.stdout, child.stderr) == ("alive\n", "")
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
