"""The class beside a harness of a few lines, as the real one is too large for CI."""

import importlib
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from helpers.commands import generated, make_workdir

from jlora.errors import UsageError


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    return make_workdir(tmp_path_factory.mktemp("harness"))


@pytest.fixture
def harness(monkeypatch) -> Any:
    """The module as it is imported beside lm-evaluation-harness."""

    def windows(
        token_list: list[int], prefix_token: int, max_seq_len: int, context_len: int
    ) -> Any:
        assert context_len == 1
        for at in range(0, len(token_list), max_seq_len):
            before = token_list[at - 1] if at else prefix_token
            yield [before], token_list[at : at + max_seq_len]

    registered: dict[str, Any] = {}

    def register_model(name: str) -> Any:
        return lambda model: registered.setdefault(name, model)

    parts = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"TemplateLM": type("TemplateLM", (), {})},
        "lm_eval.api.registry": {"register_model": register_model},
        "lm_eval.models": {},
        "lm_eval.utils": {
            "get_rolling_token_windows": windows,
            "make_disjoint_window": lambda pair: pair,
        },
    }
    for name, contents in parts.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "jlora.serving.lm_harness", raising=False)
    module = importlib.import_module("jlora.serving.lm_harness")
    assert registered == {"jlora": module.JloraLM}
    yield module
    sys.modules.pop("jlora.serving.lm_harness", None)


def requests(*args: Any) -> list[Any]:
    return [SimpleNamespace(args=each) for each in args]


def test_without_the_harness_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "jlora.serving.lm_harness", raising=False)
    with pytest.raises(UsageError, match=r"'jlora\[harness\]'"):
        importlib.import_module("jlora.serving.lm_harness")


def test_the_command_ends_in_one_line(harness, monkeypatch, capsys):
    def cli_evaluate() -> None:
        harness.JloraLM("hf", base_dtype="nf3")

    command = ModuleType("lm_eval.__main__")
    vars(command)["cli_evaluate"] = cli_evaluate
    monkeypatch.setitem(sys.modules, command.__name__, command)
    for said in (
        "model_args: base_dtype=nf3; expected one of keep,",
        "'jlora[harness]'",
    ):
        sys.modules.pop(harness.__name__, None)
        with pytest.raises(SystemExit) as end:
            runpy.run_module(harness.__name__, run_name="__main__")
        found = capsys.readouterr().err
        assert (end.value.code, found.count("\n"), said in found) == (2, 1, True)
        monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)


def test_rolling_windows_add_up_to_the_whole_text(harness, workdir):
    model = harness.JloraLM(str(workdir / "hf"), max_length=4, batch_size=2)
    text = "What is a sum?"
    ids = model.tok_encode(text)
    assert len(ids) > 4
    [whole, other] = model.loglikelihood_rolling(requests((text,), ("a",)))
    pieces, before = [], model.prefix_token_id
    for at in range(0, len(ids), 4):
        pieces.append((None, [before], ids[at : at + 4]))
        before = ids[at + 3] if at + 3 < len(ids) else 0
    found = model._loglikelihood_tokens(pieces)
    assert whole == pytest.approx(sum(value for value, _ in found), abs=1e-5)
    assert other < 0


def test_a_context_that_is_too_long_loses_its_first_tokens(harness, workdir):
    model = harness.JloraLM(str(workdir / "hf"), max_length=5)
    long, cut = ([9, 8, 7, 6, 5, 10, 11], [5, 10, 11])
    one, other = model._loglikelihood_tokens(
        [(None, long, [12, 13, 14]), (None, cut, [12, 13, 14])]
    )
    assert one == pytest.approx(other, abs=1e-5)


def test_texts_are_generated_as_the_task_says_in_the_order_of_the_requests(
    harness, workdir
):
    model = harness.JloraLM(str(workdir / "hf"))
    asked = [
        ("What is a?", {"until": [], "max_gen_toks": 6}),
        ("What is the sum of c?", {"until": ["\n\n"], "max_gen_toks": 3}),
        ("What is b?", {"until": [], "max_gen_toks": 6}),
    ]
    found = model.generate_until(requests(*asked))
    for (prompt, settings), text in zip(asked, found, strict=True):
        flags = ("--prompt", prompt, "--max_new_tokens", settings["max_gen_toks"])
        assert generated("--model", workdir / "hf", *flags) == f"{text}\n"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"until": "x"}, {"stop_strings": ["x"], "max_new_tokens": 9}),
        ({"until": ["x", "y"], "max_gen_toks": 3}, {"max_new_tokens": 3}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
    ],
)
def test_generation_settings_have_the_meaning_of_the_harness(harness, given, expected):
    settings = harness.text_config(given, 9)
    assert {name: getattr(settings, name) for name in expected} == expected


def test_a_setting_that_is_not_known_is_refused(harness, workdir):
    with pytest.raises(UsageError, match="num_beams"):
        harness.text_config({"num_beams": 4}, 9)
    with pytest.raises(UsageError, match="trust_remote_code"):
        harness.JloraLM(str(workdir / "hf"), trust_remote_code=True)
    with pytest.raises(UsageError, match=r"dtype=float; expected .* bfloat16"):
        harness.JloraLM(str(workdir / "hf"), dtype="float")
