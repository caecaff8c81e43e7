"""What a model in training writes after a few held-out prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from jlora.config.llama_config import LlamaConfig
from jlora.data.batch.batches import Dataset
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import UsageError
from jlora.loading import TextModel, model_for_text
from jlora.lora.adapter_tree import Params
from jlora.model.llama import Llama
from jlora.model.remat.layer_runs import unstacked
from jlora.parallel.sharding import tree_shardings
from jlora.report.trackers import GeneratedText
from jlora.serving.held_out import Question, answers_to, questions_of

# What keeps samples cheap: tokens of an answer, tokens of a prompt, records to look at.
_NEW_TOKENS, _PROMPT_TOKENS, _RECORDS = 64, 256, 256
# Tokens of plain text that are the prompt for the rest.
_FIRST_TOKENS = 16


@dataclass(frozen=True)
class Sampler:
    """Answers the same prompts with any parameters; the most likely tokens, so always alike."""

    questions: Sequence[Question]
    model: Llama
    tokenizer: Tokenizer
    mesh: Mesh

    def __call__(self, params: Params) -> list[GeneratedText]:
        """Returns the prompts with the answers of a model with these parameters."""
        params = unstacked(params)
        # Placed alike, so that what is compiled before training also serves after it; but in a
        # sweep of several ranks, whose adapters have one size before and their own after.
        params = jax.device_put(params, tree_shardings(self.mesh, params))
        loaded = TextModel(self.model, params, self.tokenizer)
        texts = answers_to(self.questions, loaded, max_new_tokens=_NEW_TOKENS)
        return [
            GeneratedText(question.prompt, question.reference, text)
            for question, text in zip(self.questions, texts, strict=True)
        ]


def make_sampler(
    args: Any,
    held_out: Dataset | None,
    tokenizer: Tokenizer,
    config: LlamaConfig,
    mesh: Mesh,
) -> Sampler | None:
    """Returns what a run's samples are generated with; None if it has none, which is said.

    Args:
        args: of train.py; how many prompts, and the dtype of the computation.
        held_out: data that they come from.
        tokenizer: of the model.
        config: of the model.
        mesh: devices; samples are generated on one only.

    Raises:
        UsageError: samples are asked for, and there is no held-out data.
    """
    count = args.report.num_samples(has_data=held_out is not None)
    if held_out is None or not count:
        return None
    if mesh.size > 1:
        print("no samples are generated: that takes a run on one device", flush=True)
        return None
    longest = min(_PROMPT_TOKENS, config.longest - _NEW_TOKENS)
    questions = _questions(held_out, tokenizer, count, longest)
    if not questions:
        print("no samples are generated: no held-out prompt is short enough")
        return None
    return Sampler(
        questions, model_for_text(config, args.compute.dtype), tokenizer, mesh
    )


def _questions(
    held_out: Dataset, tokenizer: Tokenizer, count: int, longest: int
) -> list[Question]:
    """Returns the first prompts that are short; of plain text, how records begin."""
    first = replace(
        held_out,
        starts=held_out.starts[:_RECORDS],
        lengths=held_out.lengths[:_RECORDS],
    )
    try:
        return questions_of(first, tokenizer, count, longest)
    except UsageError:
        return _beginnings(first, tokenizer, count) if longest > _FIRST_TOKENS else []


def _beginnings(dataset: Dataset, tokenizer: Tokenizer, count: int) -> list[Question]:
    """Returns the first tokens of texts as prompts, and what follows as references."""
    found = []
    tokens = dataset.store.tokens
    pairs = zip(dataset.starts, dataset.lengths, strict=True)
    long = ((start, n) for start, n in pairs if n >= 2 * _FIRST_TOKENS)
    for start, length in list(long)[:count]:
        end = start + min(length, _FIRST_TOKENS + _NEW_TOKENS)
        ids = tokens[start:end].tolist()
        prompt = tokenizer.decode(ids[:_FIRST_TOKENS])
        reference = tokenizer.decode(ids)[len(prompt) :]
        found.append(Question(ids[:_FIRST_TOKENS], prompt, reference))
    return found
