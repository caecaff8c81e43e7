import contextlib
import io
import sys
from pathlib import Path

import pytest
from helpers.commands import STEPS, metrics, succeed, train_flags
from helpers.data_cases import chat, write_rows

pytestmark = pytest.mark.usefixtures("in_workdir")

TALK = ("Add two.", "The sum is five.", "And now?", "It is done.")
CHAT = ["--model", "hf", "--adapter", "chat_run", "--chat", "--max_new_tokens", 30]


@pytest.fixture(scope="module")
def _chat_run(workdir) -> None:
    """A run that was trained until it repeats one conversation."""
    with contextlib.chdir(workdir):
        write_rows(Path("talk.jsonl"), [chat(*TALK)])
        flags = train_flags("chat_run", "--data.train", "talk.jsonl")
        assert "every assistant turn" in succeed("train", *flags)
        assert len(metrics(workdir / "chat_run")) == STEPS


def test_generate_continues_a_prompt_the_same_way_twice(run):
    flags = ["--model", "hf", "--prompt", "What is", "--max_new_tokens", 4]
    out = succeed("generate", *flags)
    assert len(out) > 1
    assert out.endswith("\n")
    assert out == succeed("generate", *flags)
    assert out != succeed("generate", *flags, "--adapter", "run")


def test_sampling_follows_the_seed():
    flags = ["--model", "hf", "--prompt", "What", "--max_new_tokens", 8]
    first, again, other = (
        succeed("generate", *flags, "--temperature", 2.0, "--seed", seed)
        for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.usefixtures("_chat_run")
def test_chat_answers_the_prompt_and_stops_at_the_end_of_its_turn():
    assert succeed("generate", *CHAT, "--prompt", TALK[0]) == f"{TALK[1]}\n"


@pytest.mark.usefixtures("_chat_run")
def test_chat_answers_each_line_in_its_conversation_until_an_empty_one(monkeypatch):
    typed = io.StringIO(f"{TALK[0]}\n{TALK[2]}\n\nNever read\n")
    monkeypatch.setattr(sys, "stdin", typed)
    assert succeed("generate", *CHAT) == f"{TALK[1]}\n{TALK[3]}\n"
    assert typed.read() == "Never read\n"


def test_without_a_number_of_tokens_the_model_is_filled_at_most():
    out = succeed("generate", "--model", "hf", "--prompt", "a")
    assert len(out) > 100
