"""Token ids of what people's tokenizers and conversations hold, compared with Transformers."""

from pathlib import Path

import pytest
from helpers.data_cases import CONFIG, field_files
from transformers import AutoTokenizer

from jlora.data.tokenize.tokenizer import Tokenizer


def both(folder: Path, files: dict[str, bytes]) -> tuple[Tokenizer, AutoTokenizer]:
    """The tokenizer of the same files, as jlora and as Transformers reads them."""
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return Tokenizer(files, CONFIG), AutoTokenizer.from_pretrained(folder)


THOUGHT = '<think>\nwhy\n</think>\n\n<|python_tag|>{"f": "<think>"}'
CONVERSATIONS = [
    [("user", "a <think>b</think>"), ("assistant", THOUGHT)],
    [("system", "</think> x"), ("user", "a"), ("assistant", f"x {THOUGHT} é")],
    [("user", "a"), ("assistant", "<|finetune_right_pad_id|>"), ("user", "<think>")],
]


@pytest.mark.parametrize("said", CONVERSATIONS)
@pytest.mark.parametrize("name", ["llama31", "r1_distill"])
def test_ids_of_reasoning_and_tool_markers(tmp_path, name, said):
    ours, theirs = both(tmp_path / name, field_files(name))
    messages = [{"role": role, "content": text} for role, text in said]
    expected = theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ours.encode_chat(messages) == expected
