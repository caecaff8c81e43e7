import hashlib
import json
import shutil
import sys

import ml_dtypes
import numpy as np
import pytest
from helpers.adapters import golden
from helpers.tiny import CONFIG, tensors, write_hf, write_sharded

from convert import info
from jlora.cli.command import run_command
from jlora.formats.base.base_writer import write_base
from jlora.formats.open_model import open_model
from jlora.train.checkpoint import save_checkpoint
from jlora.train.resuming import record_export

TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
    "added_tokens": [{"id": 2, "content": "</s>"}, {"id": 1, "content": "b"}],
}
SIDE = {
    "tokenizer.json": TOKENIZER,
    "tokenizer_config.json": {"chat_template": "{{ messages }}"},
    "generation_config.json": {"eos_token_id": [2, 7]},
}


def write_side_files(folder):
    for name, document in SIDE.items():
        (folder / name).write_text(json.dumps(document))


@pytest.fixture
def hf(tmp_path):
    config = CONFIG | {"attention_bias": True, "eos_token_id": 5, "head_dim": 16}
    scaling = {"rope_type": "yarn", "factor": 4.0}
    config |= {"rope_scaling": scaling | {"original_max_position_embeddings": 16}}
    folder = write_hf(tmp_path / "hf", config, tensors(config, ml_dtypes.bfloat16))
    write_side_files(folder)
    return folder


@pytest.fixture
def show(capsys):
    def command(*words):
        status = run_command(info.main, info.Arguments, argv=[*map(str, words)])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        lines = (line.split("  ", 1) for line in printed.out.splitlines())
        return {name: fact[0].strip() if fact else "" for name, *fact in lines}

    return command


FACTS = {
    "architecture": "Llama, 2 layers of 16 (MLP 24), 4 heads and 2 kv heads of 16, "
    "vocabulary 20, own head, biases in attention",
    "parameters": "9,456",
    "tensors": "bfloat16 (29)",
    "quantised": "no",
    "size": "18,912 bytes",
    "rope": "yarn, theta 10,000, factor 4 over 16, attention factor 1.13863, up to 64 "
    "positions",
    "tokenizer": "BPE, 3 tokens; generation_config.json, tokenizer.json, "
    "tokenizer_config.json",
    "end tokens": "2, 5, 7",
    "chat template": "tokenizer_config.json (14 characters)",
}


def test_facts_of_a_hugging_face_folder(hf, show):
    assert show(hf) == FACTS | {
        "format": "hf",
        "made from": "hf",
        "source": str(hf),
    }


def test_facts_of_a_converted_base_with_its_source_and_digests(hf, tmp_path, show):
    digest = write_base(open_model(str(hf)), tmp_path / "base", "keep", False)
    file = hashlib.sha256((hf / "model.safetensors").read_bytes()).hexdigest()
    assert show(tmp_path / "base") == FACTS | {
        "format": "base",
        "made from": "hf",
        "source": str(hf),
        "sha256": f"model.safetensors {file}",
        "content digest": digest,
    }


def test_every_file_with_weights_is_in_the_record(tmp_path, show):
    arrays = tensors(CONFIG)
    keys = sorted(arrays)
    shards = [{k: arrays[k] for k in part} for part in (keys[:9], keys[9:])]
    folder = write_sharded(tmp_path / "hf", CONFIG, shards)
    write_base(open_model(str(folder)), tmp_path / "base", "bfloat16", False)
    digests = [
        f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in sorted(folder.glob("*.safetensors"))
    ]
    assert show(tmp_path / "base")["sha256"] == ", ".join(digests)


def test_digests_of_a_source_are_printed_when_asked_for(hf, show):
    file = hashlib.sha256((hf / "model.safetensors").read_bytes()).hexdigest()
    assert f"sha256 of model.safetensors: {file}" in show(hf, "--digest")


def test_weights_are_not_read(hf, show):
    path = hf / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-200:] = b"\xff" * 200  # NaN
    path.write_bytes(data)
    assert show(hf)["parameters"] == FACTS["parameters"]


def test_facts_of_a_gguf_file(tmp_path, show):
    pytest.importorskip("gguf")
    from helpers.gguf_files import write_gguf

    facts = show(write_gguf(tmp_path / "m.gguf", tensors(CONFIG, np.float16)))
    assert facts["format"] == facts["made from"] == "gguf"
    assert facts["tensors"] == "float16 (21)"
    assert facts["tensor types"] == "F16 21"
    assert facts["rope"] == "default, theta 10,000, up to 64 positions"
    assert facts["tokenizer"].startswith("BPE, 20 tokens")
    assert facts["end tokens"] == "1"


def test_facts_of_a_hub_id(hf, tmp_path, show, monkeypatch):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    shutil.copytree(hf, snapshot)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot)
    )
    facts = show("owner/name@main")
    assert (facts["source"], facts["revision"]) == ("owner/name", "abc")
    assert facts["parameters"] == FACTS["parameters"]


def test_facts_of_a_peft_adapter(show):
    case = golden("basic")
    facts = show(case.folder)
    config = json.loads((case.folder / "adapter_config.json").read_text())
    assert facts["format"] == "PEFT adapter"
    assert f"rank {config['r']}, alpha {config['lora_alpha']}" in facts["adapter"]
    assert facts["modules"] == "q_proj (2), v_proj (2)"
    assert facts["base model"].startswith(config["base_model_name_or_path"] or "not")


def test_facts_of_a_run(tmp_path, show):
    shutil.copytree(golden("basic").folder, tmp_path / "run" / "adapter")
    (tmp_path / "run" / "checkpoints" / "10").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "9").mkdir()
    record_export(tmp_path / "run", 10, 9)
    facts = show(tmp_path / "run")
    assert (facts["format"], facts["read from"]) == ("run", "adapter (step 9)")
    assert facts["checkpoints"] == "9, 10"


def test_facts_of_a_checkpoint(tmp_path, show):
    leaf = {
        "lora_A": np.zeros((8, 2), np.float32),
        "lora_B": np.zeros((2, 8), np.float32),
    }
    tree = {"trainable": {"layers": {"0": {"self_attn": {"q_proj": leaf}}}}}
    settings = {"lora": {"r": 2, "target_modules": ["q_proj"]}, "model": "owner/name"}
    for step in (3, 6):
        save_checkpoint(
            tmp_path / "checkpoints", step, tree, {"settings": settings}, keep=2
        )
    facts = show(tmp_path / "checkpoints" / "3")
    assert (facts["format"], facts["read from"]) == ("run", "checkpoints/3")
    assert facts["checkpoints"] == "3, 6"
    assert facts["parameters"] == "32"


def test_an_exported_folder_is_a_model(tmp_path, show):
    folder = write_hf(tmp_path / "out", CONFIG, tensors(CONFIG))
    (folder / "adapter_config.json").write_text("{}")
    assert show(folder)["format"] == "hf"


@pytest.mark.parametrize("path", ["nothing", __file__])
def test_what_is_no_model_is_refused(path, capsys):
    status = run_command(info.main, info.Arguments, argv=[str(path)])
    assert status == 2
    assert capsys.readouterr().err.startswith(f"error: {path}")


def test_info_of_a_model_needs_no_hub_client(hf, show, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    show(hf)
