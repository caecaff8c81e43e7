"""The server with OpenAI's own client, in a process as users start it."""

import json
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from helpers.commands import call, finish, start_python, succeed, train_flags
from helpers.data_cases import chat, write_rows

openai = pytest.importorskip("openai")
httpx: Any = pytest.importorskip(
    openai.DefaultHttpxClient.__mro__[1].__module__.split(".")[0]
)

TALKS = {
    "one": ("Add two.", "The sum is five."),
    "other": ("Add two.", "It is done."),
}
KEY = "correct horse"


@pytest.fixture(scope="module")
def runs(workdir) -> dict[str, Path]:
    """Two runs that answer the same question differently, of different ranks."""
    import contextlib

    with contextlib.chdir(workdir):
        for rank, (name, talk) in enumerate(TALKS.items(), 4):
            write_rows(Path(f"{name}.jsonl"), [chat(*talk)])
            flags = train_flags(f"serve_{name}", "--data.train", f"{name}.jsonl")
            succeed("train", *flags, "--lora.r", rank)
    return {name: workdir / f"serve_{name}" for name in TALKS}


def start(workdir: Path, *flags: object, **environment: str) -> Any:
    """Starts a server on a free port; returns its process and address."""
    words = ["--model", workdir / "hf", "--port", 0, "--context", 100, *flags]
    process = start_python(ROOT / "serve.py", *words, **environment)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("serving hf"), (line, finish(process))
    return process, line.split(" on ")[1].strip()


@pytest.fixture(scope="module")
def server(workdir, runs) -> Iterator[str]:
    flags = ["--adapter", f"one={runs['one']}", "--adapter", runs["other"]]
    process, address = start(
        workdir, *flags, "--slots", 2, "--max_requests", 6, JLORA_API_KEY=KEY
    )
    yield address
    process.send_signal(signal.SIGTERM)
    done = finish(process)
    assert (done.status, done.err) == (0, "")


@pytest.fixture
def client(server) -> Any:
    with openai.OpenAI(base_url=server, api_key=KEY, max_retries=0) as client:
        yield client


def ask(client: Any, model: str, **more: Any) -> Any:
    messages = [{"role": "user", "content": "Add two."}]
    more = {"temperature": 0, **more}
    return client.chat.completions.create(model=model, messages=messages, **more)


def test_models_are_the_base_and_its_adapters(client):
    assert [model.id for model in client.models.list()] == ["hf", "one", "serve_other"]
    assert client.models.retrieve("one").owned_by == "jlora"
    with pytest.raises(openai.NotFoundError, match="no model 'two'"):
        client.models.retrieve("two")


def test_each_adapter_answers_as_it_was_trained(client, workdir):
    for name in ("one", "serve_other"):
        answer = ask(client, name)
        [choice] = answer.choices
        expected = TALKS[name.removeprefix("serve_")][1]
        assert (choice.message.content, choice.finish_reason) == (expected, "stop")
        assert answer.usage.total_tokens == (
            answer.usage.prompt_tokens + answer.usage.completion_tokens
        )
    flags = ["--model", workdir / "hf", "--chat", "--prompt", "Add two."]
    own = call("generate", *flags, "--max_new_tokens", 12).out
    base = ask(client, "hf", max_completion_tokens=12)
    assert f"{base.choices[0].message.content}\n" == own


def test_a_stream_has_the_parts_of_the_answer_and_its_usage(client):
    parts = list(
        ask(client, "one", stream=True, stream_options={"include_usage": True})
    )
    texts = [p.choices[0].delta.content for p in parts if p.choices]
    assert "".join(text or "" for text in texts) == TALKS["one"][1]
    assert len([text for text in texts if text]) > 3
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-2].choices[0].finish_reason == "stop"
    assert (
        parts[-1].usage.completion_tokens == ask(client, "one").usage.completion_tokens
    )


def test_requests_at_one_time_get_the_answers_they_get_alone(client):
    alone = {
        name: ask(client, name).choices[0].message.content for name in ("one", "hf")
    }
    found: list[tuple[str, str]] = []

    def run(name: str) -> None:
        found.append((name, ask(client, name).choices[0].message.content))

    threads = [threading.Thread(target=run, args=(n,)) for n in ["one", "hf"] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted([(n, alone[n]) for n in ("one", "hf")] * 3)


def test_completions_of_texts_and_ids(client, workdir):
    flags = ["--model", workdir / "hf", "--prompt", "What is", "--max_new_tokens", 6]
    expected = call("generate", *flags).out.removesuffix("\n")
    answer = client.completions.create(
        model="hf", prompt=["What is", "a"], max_tokens=6, temperature=0
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    stream = client.completions.create(
        model="hf", prompt="What is", max_tokens=6, temperature=0, stream=True
    )
    assert "".join(part.choices[0].text for part in stream) == expected
    ids = client.completions.create(model="hf", prompt=[5, 6, 7], temperature=0)
    assert ids.usage.prompt_tokens == 3
    assert ids.usage.completion_tokens <= 16


def test_samples_follow_the_seed_and_a_stop_string_ends_them(client):
    settings = {
        "temperature": 1.5,
        "n": 3,
        "max_tokens": 8,
        "extra_body": {"top_k": 50},
    }
    first, again = (ask(client, "hf", seed=5, **settings).choices for _ in range(2))
    texts = [choice.message.content for choice in first]
    assert texts == [choice.message.content for choice in again]
    assert len(set(texts)) == 3
    [choice] = ask(client, "one", stop=["is f"]).choices
    assert (choice.message.content, choice.finish_reason) == ("The sum ", "stop")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "two"}, "no model 'two'; there are hf, one, serve_other"),
        ({"temperature": 9e9}, "temperature=9000000000.0; expected"),
        ({"temperature": "hot"}, "temperature='hot': expected a number"),
        ({"max_tokens": 1000}, "this server takes 100 together"),
        ({"max_tokens": 0}, "max_tokens=0: expected an integer from 1"),
        ({"n": 99}, "n=99: expected an integer from 1 to 8"),
        ({"logprobs": True}, "logprobs=True is not supported"),
        ({"stop": ["a"] * 5}, "stop: expected a text, or a list of at most 4"),
        ({"messages": []}, "messages"),
        ({"temperature": 10**400}, "temperature: too large a number"),
        ({"messages": [{"content": "a"}]}, "messages 0: expected objects with role"),
        ({"messages": [{"role": "emperor", "content": "a"}]}, "emperor"),
        (
            {"extra_body": {"top_kk": 5}},
            "unknown field 'top_kk'; did you mean 'top_k'?",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_request_is_named(fields, message, client):
    plain = {"messages": [{"role": "user", "content": "a"}], "model": "hf"}
    with pytest.raises(openai.APIStatusError) as error:
        client.chat.completions.create(**{**plain, **fields})
    assert error.value.status_code == (404 if "model" in fields else 400)
    assert message in error.value.message


def test_a_wrong_key_and_too_many_requests_are_refused(server, client):
    with (
        openai.OpenAI(base_url=server, api_key="wrong", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError, match="bearer key"),
    ):
        other.models.list()
    # One that can never be answered is not to be repeated.
    with pytest.raises(openai.BadRequestError, match=r"8 texts in one request; .* 6"):
        client.completions.create(model="hf", prompt=["a"] * 4, n=2, max_tokens=2)
    assert ask(client, "one").choices[0].message.content == TALKS["one"][1]


def post(server: str, **more: Any) -> Any:
    headers = {"Authorization": f"Bearer {KEY}", **more.pop("headers", {})}
    return httpx.post(f"{server}/completions", headers=headers, **more)


def test_what_a_browser_or_a_stranger_could_send_is_refused(server):
    good = {"model": "hf", "prompt": "a", "max_tokens": 2}
    answer = post(server, json=good, headers={"Origin": "http://evil.example"})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if "access-control" in name.lower()]
    form = {"content": json.dumps(good), "headers": {"Content-Type": "text/plain"}}
    assert post(server, **form).status_code == 415
    named = post(server, json=good, headers={"Host": "evil.example"})
    assert named.status_code == 400
    large = post(server, json={**good, "prompt": "a" * (1 << 20)})
    assert (large.status_code, large.json()["error"]["type"]) == (
        413,
        "invalid_request_error",
    )
    broken = post(server, content="{", headers={"Content-Type": "application/json"})
    assert broken.status_code == 400
    assert "not JSON" in broken.json()["error"]["message"]
    address = server.removesuffix("/v1")
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    assert httpx.get(f"{address}/nothing").status_code == 404
    assert httpx.get(f"{server}/completions").status_code == 405


def test_a_client_that_leaves_frees_its_slot(server, client):
    for _ in range(3):
        stream = ask(client, "hf", stream=True, max_tokens=60)
        next(iter(stream))
        stream.close()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:  # all that the limit allows
            client.completions.create(model="hf", prompt=["a"] * 6, max_tokens=1)
            return
        except openai.RateLimitError:
            time.sleep(0.1)
    pytest.fail("the requests of clients that left were not ended")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_answers_what_was_asked(number, workdir):
    process, address = start(workdir)
    with openai.OpenAI(base_url=address, api_key="any", max_retries=0) as client:
        stream = client.completions.create(
            model="hf", prompt="a", max_tokens=60, temperature=0, stream=True
        )
        parts = [next(stream).choices[0].text]
        process.send_signal(number)
        parts += [part.choices[0].text for part in stream]
        expected = call(
            *("generate", "--model", workdir / "hf", "--prompt", "a"),
            *("--max_new_tokens", 60),
        ).out
        assert f"{''.join(parts)}\n" == expected
    done = finish(process)
    assert (done.status, done.err) == (0, "")


def test_only_this_machine_is_served(workdir):
    process, address = start(workdir)
    try:
        assert address.startswith("http://127.0.0.1:")
        port = int(address.split(":")[2].split("/")[0])
        taken = call("serve", "--model", workdir / "hf", "--port", port)
        assert taken.status == 2
        assert f"127.0.0.1:{port}: Address already in use" in taken.err
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=5)
    finally:
        process.send_signal(signal.SIGINT)
        finish(process)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter", "a/run", "--adapter", "b/run"], "the name 'run' is taken"),
        (["--adapter", "hf=run"], "the name 'hf' is taken"),
        (["--port", 70000], "port=70000; expected 0 to 65535"),
        (["--slots", 0], "slots=0; expected at least 1"),
        (["--context", 1000], "context=1000 exceeds the model's"),
    ],
)
def test_mistakes_are_named(flags, message, workdir):
    done = call("serve", "--model", workdir / "hf", *flags)
    assert (done.status, message in done.err) == (2, True), done.err


@pytest.mark.parametrize("token", [2**40, 2**31 - 1, 100_000])
def test_a_token_id_that_the_model_lacks_is_refused(token, client):
    with pytest.raises(openai.BadRequestError, match=f"token id {token}; the model"):
        client.completions.create(model="hf", prompt=[1, token], max_tokens=2)
    assert ask(client, "one").choices[0].message.content == TALKS["one"][1]


@pytest.mark.usefixtures("run")
def test_an_adapter_that_changes_the_base_is_refused(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    shutil.copytree(workdir / "run" / "adapter", workdir / "serve_pissa")
    settings = workdir / "serve_pissa" / "adapter_config.json"
    pissa = json.loads(settings.read_text()) | {"init_lora_weights": "pissa"}
    settings.write_text(json.dumps(pissa))
    done = call("serve", "--model", "hf", "--adapter", "serve_pissa")
    assert done.status == 3
    assert "not plain LoRA" in done.err
    assert "kernel" in done.err


def test_an_adapter_that_is_not_plain_lora_is_refused(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    flags = ["--lora.use_dora", "--train.max_steps", 1]
    succeed("train", *train_flags("serve_dora", *flags))
    done = call("serve", "--model", "hf", "--adapter", "serve_dora")
    assert done.status == 3
    assert "not plain LoRA at model.layers.0.mlp.down_proj (lora_A" in done.err
    assert "merge it (jlora export)" in done.err
