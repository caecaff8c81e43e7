import contextlib
import io
import json
import signal
import sys
from pathlib import Path

import pytest
from helpers.commands import STEPS, call, generated, metrics, succeed, train_flags
from helpers.data_cases import chat, write_rows

from jlora.cli import jlora_command
from jlora.model.decoding.token_rows import Generation

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
    out = generated(*flags)
    assert len(out) > 1
    assert out.endswith("\n")
    assert out == generated(*flags)
    assert out != generated(*flags, "--adapter", "run")


@pytest.mark.parametrize("base_dtype", ["keep", "int8"])
def test_the_text_does_not_depend_on_the_mesh(base_dtype, run):
    flags = ["--model", "hf", "--adapter", "run", "--base_dtype", base_dtype]
    flags += ["--prompt", "What is", "--max_new_tokens", 12]
    assert generated(*flags, "--mesh.tensor", 2) == generated(*flags)


def test_a_mesh_that_does_not_divide_the_model_is_refused():
    done = call("generate", "--model", "hf", "--prompt", "a", "--mesh.tensor", 8)
    assert done.status == 2
    assert "mesh.tensor=8 does not divide" in done.err


def test_sampling_follows_the_seed():
    flags = ["--model", "hf", "--prompt", "What", "--max_new_tokens", 8]
    first, again, other = (
        generated(*flags, "--temperature", 2.0, "--seed", seed) for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.usefixtures("_chat_run")
def test_chat_answers_the_prompt_and_stops_at_the_end_of_its_turn():
    assert generated(*CHAT, "--prompt", TALK[0]) == f"{TALK[1]}\n"


@pytest.mark.usefixtures("_chat_run")
def test_chat_answers_each_line_in_its_conversation(monkeypatch):
    typed(monkeypatch, TALK[0], "", TALK[2])
    assert generated(*CHAT) == f"{TALK[1]}\n{TALK[3]}\n"


def typed(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{x}\n" for x in lines)))


@pytest.mark.usefixtures("_chat_run")
def test_the_commands_of_a_chat(monkeypatch, tmp_path):
    saved = tmp_path / "saved.jsonl"
    typed(
        monkeypatch,
        *(TALK[0], "/adapter off", TALK[0], "/reset", "/adapter on", TALK[0]),
        *(f"/save {saved}", "/system Be brief.", f"/save {saved}", "/wrong", "/help"),
        *("/system", "/reset", f"/save {saved}"),
    )
    lines = generated(*CHAT).splitlines()
    assert lines[:2] == [TALK[1], "The adapter is off."]
    rest = lines[lines.index("The conversation is forgotten.") :]
    assert rest[1:3] == ["The adapter is on.", TALK[1]]
    assert lines[2] != TALK[1]  # the base model does not know the answer
    assert "Not understood: /wrong" in lines
    assert lines[-1] == "Nothing was said yet."
    turns = chat(*TALK[:2])["messages"]
    assert [
        json.loads(line)["messages"] for line in saved.read_text().splitlines()
    ] == [
        turns,
        [{"role": "system", "content": "Be brief."}, *turns],
    ]


@pytest.mark.usefixtures("_chat_run")
def test_ctrl_c_ends_an_answer_and_not_the_session(monkeypatch, capsys):
    typed(monkeypatch, TALK[0], TALK[2])
    whole, begun = Generation.__iter__, []

    def interrupted(self):
        for tokens in whole(self):
            yield tokens
            if not begun:
                begun.append(True)
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Generation, "__iter__", interrupted)
    first, second = generated(*CHAT).splitlines()
    assert first.endswith(" [ended]")
    assert TALK[1].startswith(first.removesuffix(" [ended]"))
    assert second


@pytest.mark.usefixtures("_chat_run")
def test_jlora_chat_is_generate_chat(monkeypatch, capsys):
    typed(monkeypatch, TALK[0])
    words = [str(word) for word in CHAT if word != "--chat"]
    assert jlora_command.main(["chat", *words]) == 0
    assert capsys.readouterr().out == f"{TALK[1]}\n"


@pytest.mark.usefixtures("_chat_run")
def test_a_conversation_in_a_file_is_answered(tmp_path):
    talk = chat(*TALK[:3])["messages"]
    for name, document in (("list", talk), ("record", {"messages": talk})):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(document))
        flags = [*CHAT[:4], "--max_new_tokens", 30, "--messages", file]
        assert generated(*flags) == f"{TALK[3]}\n"


@pytest.mark.usefixtures("_chat_run")
def test_a_file_of_prompts_becomes_records_that_training_reads(tmp_path):
    rows = [
        chat(*TALK[:3]),
        {"prompt": "The sum", "id": 7},
        chat(TALK[0]),
        {"prompt": "It"},
    ]
    write_rows(tmp_path / "prompts.jsonl", rows)
    flags = [*CHAT[:4], "--max_new_tokens", 30, "--prompts", tmp_path / "prompts.jsonl"]
    out = [json.loads(line) for line in generated(*flags).splitlines()]
    assert out[0] == chat(*TALK)
    assert out[2] == chat(*TALK[:2])
    assert out[1].keys() == {"prompt", "id", "completion"}
    for row in (1, 3):  # the same as by itself: nothing sees another row
        alone = generated(*flags[:-2], "--prompt", out[row]["prompt"])
        assert f"{out[row]['completion']}\n" == alone
    assert generated(*flags, "--batch_size", 2) == generated(*flags)


def test_samples_differ_and_do_not_depend_on_the_batch(tmp_path):
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "What"}])
    flags = [
        "--model",
        "hf",
        "--max_new_tokens",
        8,
        "--temperature",
        1.5,
        "--top_k",
        50,
    ]
    flags += ["--num_return_sequences", 3, "--prompts", tmp_path / "prompts.jsonl"]
    out = generated(*flags)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == ["a"] * 3 + ["What"] * 3
    assert len({row["completion"] for row in rows}) == 6
    assert generated(*flags, "--batch_size", 1) == out
    alone = generated(*flags[:8], "--prompt", "a")
    assert alone == f"{rows[0]['completion']}\n"


@pytest.mark.usefixtures("_chat_run")
@pytest.mark.parametrize("base_dtype", ["int8", "nf4", "bfloat16"])
def test_an_adapter_answers_on_a_base_in_another_format(base_dtype):
    out = generated(*CHAT, "--prompt", TALK[0], "--base_dtype", base_dtype)
    assert out.startswith("The sum")


@pytest.mark.usefixtures("_chat_run")
def test_an_answer_ends_before_a_stop_string():
    out = generated(
        *CHAT, "--prompt", TALK[0], "--stop_strings", "is f", "--stop_strings", "zzz"
    )
    assert out == "The sum \n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --prompt TEXT, --messages FILE, --prompts FILE or --chat"),
        (["--prompt", "a", "--prompts", "b"], "give one of --prompt"),
        (["--prompt", "a", "--system", "b"], "--system is for conversations"),
        (["--prompts", "none"], "none: cannot be read (No such file or directory)"),
        (["--prompts", "train.jsonl", "--batch_size", 0], "batch_size=0; expected"),
        (["--prompt", "a", "--max_new_tokens", 0], "max_new_tokens=0; expected"),
        (["--prompt", "a", "--top_p", 0], "top_p=0.0; expected above 0"),
        (["--messages", "chat.jsonl", "--max_new_tokens", 999], "max_new_tokens=999"),
        (["--prompt", "a", "--num_return_sequences", 2], "would be the same"),
        (
            ["--chat", "--num_return_sequences", 2, "--temperature", 1],
            "no effect at the keyboard",
        ),
        (
            ["--prompts", "train.jsonl", "--system", "b"],
            "not conversations, on which --system has no effect; add --chat",
        ),
    ],
)
def test_mistakes_are_named(flags, message):
    done = call("generate", "--model", "hf", *flags)
    assert (done.status, message in done.err) == (2, True), done.err


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ('{"text": "a"}', "expected {"),
        ('{"prompt": "a", "messages": []}', "expected {"),
        ('{"messages": []}', "expected {"),
        ("nonsense", "not JSON"),
    ],
)
def test_a_wrong_line_of_prompts_is_named(line, where, tmp_path):
    file = write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}, line])
    done = call("generate", "--model", "hf", "--prompts", file)
    assert done.status == 4
    assert f"{file}, line 2" in done.err
    assert where in done.err


def test_without_a_number_of_tokens_the_model_is_filled_at_most():
    out = generated("--model", "hf", "--prompt", "a")
    assert len(out) > 100
