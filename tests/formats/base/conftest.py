import ml_dtypes
import numpy as np
import pytest
from helpers.tiny import CONFIG, tensors, write_hf


@pytest.fixture
def hf(tmp_path):
    arrays = tensors(CONFIG, ml_dtypes.bfloat16)
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.float32)
    folder = write_hf(tmp_path / "hf", CONFIG, arrays)
    (folder / "tokenizer.json").write_bytes(b'{"a": "\xc3\xa9"}\r\n')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_bytes(b"x")
    return folder
