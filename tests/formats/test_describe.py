from helpers.tiny import CONFIG, tensors, write_hf

from jlora.formats.describe import describe_model
from jlora.formats.open_model import open_model


def test_description_of_a_source_reads_no_weights(tmp_path):
    hf = write_hf(tmp_path / "hf", CONFIG, tensors(CONFIG))
    (hf / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    lines = "\n".join(describe_model(open_model(str(hf))))
    for fact in ("2 layers of 16", "4 heads and 2 kv heads of 4", "own head"):
        assert fact in lines
