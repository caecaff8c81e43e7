"""Answers to held-out records, generated and compared with the references."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jlora.config.sampling_config import TextConfig
from jlora.data.batch.batches import Dataset
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import UsageError
from jlora.loading import TextModel
from jlora.serving.completions import complete
from jlora.serving.prompt_files import batches


class Question(NamedTuple):
    """A record up to its last answer, and that answer."""

    ids: list[int]
    prompt: str
    reference: str


def questions_of(
    dataset: Dataset, tokenizer: Tokenizer, limit: int, longest: int
) -> list[Question]:
    """Returns the first `limit` records that have a prompt and an answer.

    The prompt is what the model reads in training: the tokens before the last answer.

    Args:
        dataset: not shuffled.
        tokenizer: of the model.
        limit: how many to return at most.
        longest: tokens of the longest text that the model takes.

    Raises:
        UsageError: no record has both.
    """
    found: list[Question] = []
    store = dataset.store
    for start, length in zip(dataset.starts, dataset.lengths, strict=True):
        tokens = store.tokens[start : start + length].tolist()
        mask = store.loss_mask[start : start + length].tolist()
        if len(found) == limit:
            break
        end = max((i for i, counted in enumerate(mask) if counted), default=-1) + 1
        begin = end
        while begin and mask[begin - 1]:
            begin -= 1
        prompt = tokenizer.decode(tokens[:begin])
        # The text of a token depends on those before it.
        reference = tokenizer.decode(tokens[:end])[len(prompt) :]
        # Of plain text, all but the first token is counted.
        if begin > 1 and prompt and reference.strip() and begin < longest:
            found.append(Question(tokens[:begin], prompt, reference))
    if not found:
        raise UsageError(
            "no record has a prompt and an answer to compare with; --generate needs data of "
            "format prompt_completion, messages, alpaca or sharegpt"
        )
    return found


def answers_to(
    questions: Sequence[Question], loaded: TextModel, *, max_new_tokens: int | None
) -> list[str]:
    """Returns the most likely answers."""
    settings = TextConfig(max_new_tokens=max_new_tokens)
    answers = [""] * len(questions)
    for batch in batches([len(question.ids) for question in questions], 8):
        prompts = [(questions[i].ids, i, 0) for i in batch]
        for i, text in zip(batch, complete(loaded, prompts, settings), strict=True):
            answers[i] = text
    return answers


def import_chrf() -> type:
    """Returns sacrebleu's chrF.

    Raises:
        UsageError: it is not installed.
    """
    try:
        from sacrebleu.metrics import CHRF
    except ImportError as error:
        raise UsageError(
            "--generate needs sacrebleu: pip install 'jlora[eval]'"
        ) from error
    return CHRF


def figures_of(answers: Sequence[str], questions: Sequence[Question]) -> dict[str, str]:
    """Returns {name: figure} of how close the answers are to the references.

    `exact match` is the share of answers that are the reference, but for space around them;
    `chrF` of all of them, from 0 to 100, counts character n-grams that agree.
    """
    texts = [text.strip() for text in answers]
    references = [question.reference.strip() for question in questions]
    same = sum(a == b for a, b in zip(texts, references, strict=True))
    chrf = import_chrf()().corpus_score(texts, [references]).score
    return {
        "exact match": f"{same / len(texts):.3f}",
        "chrF": f"{chrf:.2f}",
        "answers": f"{len(texts):,}",
    }


def check_answers(path: str | None) -> None:
    """Checks, before anything is computed, that `write_answers` can write to a file.

    Raises:
        UsageError: its folder is not there or cannot be written to, or it is a folder.
    """
    if path is None:
        return
    file, folder = Path(path), Path(path).absolute().parent
    if not folder.is_dir():
        raise UsageError(f"answers={path}: there is no folder {folder}; make it first")
    if file.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        raise UsageError(f"answers={path}: cannot be written; name another file")


def write_answers(
    path: Path, questions: Sequence[Question], answers: Mapping[str, Sequence[str]]
) -> None:
    """Writes a line of JSON for each question: prompt, reference, and every model's answer.

    Raises:
        UsageError: the file cannot be written.
    """
    lines = [
        json.dumps(
            {
                "prompt": question.prompt,
                "reference": question.reference,
                "answers": {name: texts[i] for name, texts in answers.items()},
            },
            ensure_ascii=False,
        )
        for i, question in enumerate(questions)
    ]
    try:
        path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from error
