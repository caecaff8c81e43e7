import json

import pytest
from helpers import GOLDEN
from helpers.adapters import files, golden
from helpers.exports import HF_GOLDEN, copy_base, read_config
from helpers.exports import export as export_golden
from helpers.tiny import CONFIG, tensors, write_hf

from jlora.config.llama_config import LlamaConfig
from jlora.formats.hf.export_config import export_config, reader_notes
from jlora.formats.open_model import open_model

ROPE = json.loads((GOLDEN / "rope/cases.json").read_text())
CASES = ROPE["cases"]
SMALL = CONFIG | {"head_dim": 16}


@pytest.fixture
def export(tmp_path):
    def convert(changes):
        config = SMALL | changes
        folder = write_hf(tmp_path / "model", config, tensors(config))
        source = open_model(str(folder))
        return export_config(source.hf_config, source.config, "float32")

    return convert


def scaled(name):
    return {"rope_theta": 5e4, "rope_scaling": CASES[name]}


@pytest.mark.parametrize("name", CASES)
def test_an_exported_rope_means_the_same(name, export):
    exported = export(scaled(name))
    assert LlamaConfig.from_hf(exported) == LlamaConfig.from_hf(SMALL | scaled(name))


@pytest.mark.parametrize("name", CASES)
def test_the_rope_stands_in_the_places_of_transformers_4_and_5(name, export):
    exported = export(scaled(name))
    theta = exported["rope_theta"]
    assert theta == exported["rope_parameters"]["rope_theta"] == 5e4
    older = exported["rope_scaling"] or {"rope_type": "default"}
    assert exported["rope_parameters"] == older | {"rope_theta": theta}
    assert "type" not in older


@pytest.mark.parametrize("name", ["llama3", "yarn", "longrope"])
def test_defaults_are_written_out_as_numbers(name, export):
    changes = scaled(name)
    changes["rope_scaling"] = {
        key: value
        for key, value in changes["rope_scaling"].items()
        if name == "llama3" or not key.startswith("original")
    }
    exported = export(changes)["rope_scaling"]
    assert isinstance(exported["factor"], float)
    assert isinstance(exported["original_max_position_embeddings"], int)


def test_a_longrope_within_its_original_context_is_read_again(export):
    changes = scaled("longrope")
    changes["rope_scaling"] = changes["rope_scaling"] | {
        "original_max_position_embeddings": 65
    }
    exported = export(changes)
    assert exported["rope_scaling"]["factor"] == 1
    assert LlamaConfig.from_hf(exported) == LlamaConfig.from_hf(SMALL | changes)


@pytest.mark.parametrize(
    ("name", "original", "is_written"),
    [
        ("longrope", 32, True),
        ("llama3", 32, True),
        ("llama3", 8192, False),
        ("yarn", 32, False),
        ("linear", 32, False),
    ],
)
def test_the_original_context_is_at_the_top_where_it_is_read(
    name, original, is_written, export
):
    key = "original_max_position_embeddings"
    changes = scaled(name)
    changes["rope_scaling"] = changes["rope_scaling"] | {key: original}
    assert export(changes).get(key) == (original if is_written else None)


@pytest.mark.parametrize(
    ("names", "kind", "expected"),
    [
        (["LLaMAForCausalLM"], "llama", ("LlamaForCausalLM", "llama")),
        (["LlamaModel"], "llama", ("LlamaForCausalLM", "llama")),
        (None, "llama", ("LlamaForCausalLM", "llama")),
        (["LlamaForCausalLM"], None, ("LlamaForCausalLM", "llama")),
        (["MistralForCausalLM"], "mistral", ("MistralForCausalLM", "mistral")),
        (["MistralForCausalLM"], None, ("MistralForCausalLM", "mistral")),
        (None, "mistral", ("MistralForCausalLM", "mistral")),
    ],
)
def test_the_class_is_the_one_of_a_model_with_a_head(names, kind, expected, export):
    window = {"sliding_window": None}
    exported = export({"architectures": names, "model_type": kind} | window)
    assert (exported["architectures"], exported["model_type"]) == (
        [expected[0]],
        expected[1],
    )


OLDER = "llama.cpp, and vLLM before 0.30, ignore attention_factor and mscale"
IGNORED = "llama.cpp ignores it"
LONG = "vLLM takes long_factor for every text unless max_model_len is 32 or less"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("default", []),
        ("linear", []),
        ("llama3", []),
        ("yarn", []),
        ("yarn_own_range", ["llama.cpp ignores truncate"]),
        ("yarn_factor_null", []),
        ("yarn_mscale", [OLDER]),
        ("yarn_attention", [OLDER]),
        ("dynamic", [IGNORED, "vLLM has 64 positions"]),
        ("longrope", [IGNORED, LONG]),
        ("longrope_factor", [IGNORED, LONG, "1.09545 from the lengths where the"]),
        ("longrope_attention", [IGNORED, LONG, "the model has attention_factor 1.1;"]),
    ],
)
def test_what_other_readers_would_get_wrong_is_told(name, words):
    notes = reader_notes(LlamaConfig.from_hf(SMALL | scaled(name)))
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))


@pytest.mark.parametrize(("factor", "positions"), [(1.4, 45), (2.0, None), (4.0, None)])
def test_a_yarn_that_reaches_less_far_than_the_model_is_told(factor, positions):
    rope = {"rope_scaling": CASES["yarn"] | {"factor": factor}}
    notes = reader_notes(LlamaConfig.from_hf(SMALL | rope))
    found = [note for note in notes if f"vLLM has {positions} positions" in note]
    assert len(found) == len(notes) == (positions is not None)


@pytest.mark.parametrize("base", ["untied_fp32", "tied_fp32"])
def test_rope_and_dtype_are_where_every_reader_looks(base, out):
    name = {"untied_fp32": "basic", "tied_fp32": "tied"}[base]
    config = read_config(export_golden(golden(name), out))
    theta = {"untied_fp32": 500000.0, "tied_fp32": 50000.0}[base]
    assert config["rope_theta"] == theta
    assert config["rope_scaling"] is None
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": theta}
    assert config["dtype"] == config["torch_dtype"] == "float32"


@pytest.mark.parametrize("name", ["basic", "tied"])
def test_other_settings_are_kept_verbatim(name, out):
    case = golden(name)
    before, after = read_config(case.base), read_config(export_golden(case, out))
    rewritten = {"rope_theta", "rope_scaling", "rope_parameters"}
    rewritten |= {"dtype", "torch_dtype"}
    for key in before.keys() - rewritten:
        assert after[key] == before[key]
    assert after.keys() == before.keys() | rewritten


def test_an_exported_configuration_means_the_same_model(out):
    source = open_model(str(HF_GOLDEN / "llama3"))
    out.mkdir()
    for name, data in files(HF_GOLDEN / "llama3").items():
        (out / name).write_bytes(data)
    (out / "config.json").write_text(
        json.dumps(export_config(source.hf_config, source.config, "float32"))
    )
    assert open_model(str(out)).config == source.config


def test_llama3_rope_is_written_for_every_reader():
    source = open_model(str(HF_GOLDEN / "llama3"))
    config = export_config(source.hf_config, source.config, "bfloat16")
    numbers = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    assert config["rope_scaling"] == numbers
    assert config["rope_parameters"] == numbers | {"rope_theta": 500000.0}
    assert config["original_max_position_embeddings"] == 32
    assert config["rope_theta"] == 500000.0


def test_code_and_private_settings_are_stripped(out, tmp_path):
    settings = {
        "auto_map": {"AutoModel": "evil.Model"},
        "quantization_config": None,
        "_name_or_path": "x",
        "_attn_implementation_internal": "eager",
        "pretraining_tp": 2,
    }
    base = copy_base(tmp_path / "base", "untied_fp32", config=settings)
    config = read_config(export_golden(golden("basic")._replace(base=base), out))
    assert not settings.keys() - {"pretraining_tp"} & config.keys()
    assert config["pretraining_tp"] == 2
