import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.tiny import (
    CONFIG,
    EMBEDDING,
    HEAD,
    Q_PROJ,
    halves,
    tensors,
    write_hf,
    write_sharded,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import convert
from jlora.errors import CorruptError, UnsupportedError, UsageError
from jlora.formats import load_params as loading
from jlora.formats.load_params import load_params
from jlora.formats.model_source import read_as
from jlora.formats.open_model import open_model
from jlora.formats.tensor_checks import first_non_finite

# What is refused, and with which words: tests/faults.py.
TIED = CONFIG | {"tie_word_embeddings": True}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "model"


def leaves(params):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def test_one_tensor_is_on_its_way_while_the_next_is_read(folder, monkeypatch):
    source = open_model(str(write_hf(folder, CONFIG, tensors(CONFIG))))
    events = []

    def noting(name, function):
        def noted(*args, **kwargs):
            events.append(name)
            return function(*args, **kwargs)

        return noted

    for name, what in (("read", "read_leaves"), ("sent", "_place")):
        monkeypatch.setattr(loading, what, noting(name, getattr(loading, what)))
    waiting = noting("waited", jax.block_until_ready)
    monkeypatch.setattr(loading.jax, "block_until_ready", waiting)
    load_params(source)
    assert events == ["read", "waited", "sent"] * len(source.tensors) + ["waited"]


def test_kernels_are_the_transposes_of_hf_weights(folder):
    arrays = tensors(CONFIG)
    params = load_params(open_model(str(write_hf(folder, CONFIG, arrays))))
    kernel = params["layers"]["0"]["self_attn"]["q_proj"]["kernel"]
    assert np.array_equal(kernel, arrays[Q_PROJ].T)
    assert np.array_equal(params["embed_tokens"]["embedding"], arrays[EMBEDDING])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_kept_dtypes_are_bit_exact(folder, dtype):
    arrays = tensors(CONFIG, dtype)
    params = load_params(open_model(str(write_hf(folder, CONFIG, arrays))))
    head = np.asarray(params["lm_head"]["kernel"])
    assert head.dtype == dtype
    assert np.ascontiguousarray(head.T).tobytes() == arrays[HEAD].tobytes()


def test_float64_is_narrowed_to_the_widest_dtype_of_jax(folder):
    source = open_model(str(write_hf(folder, CONFIG, tensors(CONFIG, np.float64))))
    assert {leaf.dtype for leaf in leaves(load_params(source)).values()} == {
        np.dtype(np.float32)
    }


def test_mixed_dtypes_stay_as_they_are(folder):
    arrays = tensors(CONFIG, ml_dtypes.bfloat16)
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.float32)
    params = load_params(open_model(str(write_hf(folder, CONFIG, arrays))))
    assert params["norm"]["scale"].dtype == jnp.float32
    assert params["embed_tokens"]["embedding"].dtype == jnp.bfloat16


def test_asked_dtype_applies_to_every_leaf(folder):
    source = open_model(str(write_hf(folder, CONFIG, tensors(CONFIG))))
    params = load_params(source, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


def test_shards_give_the_same_params_as_one_file(folder, tmp_path):
    arrays = tensors(CONFIG)
    one = load_params(open_model(str(write_hf(folder, CONFIG, arrays))))
    sharded = write_sharded(tmp_path / "sharded", CONFIG, halves(arrays))
    two = load_params(open_model(str(sharded)))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, two))


@pytest.mark.parametrize("shards_left", [0, 1, 2])
def test_single_file_wins_over_an_older_index(folder, capsys, shards_left):
    arrays = tensors(CONFIG)
    old = {key: 0 * array for key, array in arrays.items()}
    write_sharded(folder, CONFIG, halves(old))
    for shard in sorted(folder.glob("model-*"))[shards_left:]:
        shard.unlink()
    write_hf(folder, CONFIG, arrays)
    source = open_model(str(folder))
    assert [file.name for file in source.weights] == ["model.safetensors"]
    params = load_params(source)
    assert np.array_equal(params["embed_tokens"]["embedding"], arrays[EMBEDDING])
    said = capsys.readouterr().err
    assert said.count("holds two models: model.safetensors was read") == (
        shards_left > 0
    )
    assert said.count("\n") == (shards_left > 0)


def test_index_that_is_not_read_may_be_damaged(folder, capsys):
    write_hf(folder, CONFIG, tensors(CONFIG))
    (folder / "model.safetensors.index.json").write_text("{")
    open_model(str(folder))
    assert capsys.readouterr().err == ""


def test_biases_are_read(folder):
    config = CONFIG | {"attention_bias": True, "mlp_bias": True}
    arrays = tensors(config)
    params = load_params(open_model(str(write_hf(folder, config, arrays))))
    bias = params["layers"]["1"]["mlp"]["down_proj"]["bias"]
    assert np.array_equal(bias, arrays["model.layers.1.mlp.down_proj.bias"])


def test_tied_model_has_no_head(folder):
    params = load_params(open_model(str(write_hf(folder, TIED, tensors(TIED)))))
    assert "lm_head" not in params


def test_tied_head_equal_to_the_embedding_is_dropped(folder):
    arrays = tensors(TIED)
    arrays[HEAD] = arrays[EMBEDDING]
    source = open_model(str(write_hf(folder, TIED, arrays)))
    assert "lm_head/kernel" not in source.tensors


def test_inv_freq_of_old_files_is_ignored(folder):
    arrays = tensors(CONFIG)
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    assert len(open_model(str(write_hf(folder, CONFIG, arrays))).tensors) == 21


def test_save_of_the_bare_model_is_accepted(folder):
    arrays = {k.removeprefix("model."): v for k, v in tensors(TIED).items()}
    source = open_model(str(write_hf(folder, TIED, arrays)))
    assert np.array_equal(
        source.read("embed_tokens/embedding"), arrays["embed_tokens.weight"]
    )


def test_half_of_the_names_without_prefix_is_refused(folder):
    arrays = tensors(TIED)
    arrays["norm.weight"] = arrays.pop("model.norm.weight")
    with pytest.raises(CorruptError, match=r"missing: model\.norm.*unexpected: norm"):
        open_model(str(write_hf(folder, TIED, arrays)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_non_finite_value_is_found_with_its_index(folder, value, dtype):
    arrays = tensors(CONFIG, dtype)
    arrays[Q_PROJ][3, 5] = value
    source = open_model(str(write_hf(folder, CONFIG, arrays)))
    with pytest.raises(CorruptError, match=rf"{Q_PROJ}'.* at \[3, 5\]"):
        load_params(source)


def test_non_finite_value_is_found_beyond_the_first_piece():
    array = np.zeros((3, 1 << 20), np.float32)
    array[2, 7] = np.nan
    assert first_non_finite(array) == (2, 7)


def test_value_too_large_for_the_asked_dtype_is_named(folder):
    arrays = tensors(CONFIG)
    arrays[Q_PROJ][3, 5] = 1e5
    source = open_model(str(write_hf(folder, CONFIG, arrays)))
    with pytest.raises(CorruptError, match=r"q_proj/kernel.* at \[5, 3\].*float16"):
        read_as(source, "layers/0/self_attn/q_proj/kernel", "float16")


def test_zero_matrix_is_a_warning(folder, capsys):
    arrays = tensors(CONFIG)
    arrays[Q_PROJ] *= 0
    load_params(open_model(str(write_hf(folder, CONFIG, arrays))))
    assert f"{Q_PROJ}': every value is zero" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "/x.safetensors", "a\0.safetensors", "x.bin", 7, None),
        *("a\nb.safetensors", "\ud800.safetensors", f"{'x' * 300}.safetensors"),
    ],
)
def test_weight_map_with_a_bad_file_name_opens_nothing(folder, name):
    write_sharded(folder, CONFIG, [tensors(CONFIG)], {EMBEDDING: name})
    expected = r"not plain \.safetensors file names|half of a character"
    with pytest.raises(CorruptError, match=expected):
        open_model(str(folder))


def test_index_and_shards_are_compared_both_ways(folder):
    first, second = halves(tensors(CONFIG))
    write_sharded(folder, CONFIG, [first, second | {EMBEDDING: first[EMBEDDING]}])
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptError) as error:
        open_model(str(folder))
    for part in (
        f"in two shards: {EMBEDDING}",
        "model-00002-of-00002.safetensors that the index does not name: model.norm",
        "expects in model-00001-of-00002.safetensors: ghost",
    ):
        assert part in str(error.value)


def test_many_wild_numberings_are_refused_in_bounded_time_and_memory(folder):
    wild = {f"t{i}": f"a{i}-00001-of-99999.safetensors" for i in range(3000)}
    write_sharded(folder, CONFIG, halves(tensors(CONFIG)), wild)
    tracemalloc.start()
    with pytest.raises(CorruptError, match=r"missing files: .* and \d+ more"):
        open_model(str(folder))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50 << 20  # all implied names would take 30 GB


def test_a_repeated_key_among_very_many_is_found_at_once(folder):
    many = ",".join(f'"{i:x}":0' for i in range(100_000))
    folder.mkdir()
    (folder / "config.json").write_text("{" + many + ',"y":0,"y":0}')
    with pytest.raises(CorruptError, match="'y' occurs twice"):
        open_model(str(folder))  # comparing each with each would take minutes


def test_wrong_total_size_is_a_warning(folder, capsys):
    write_sharded(folder, CONFIG, [tensors(CONFIG)])
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"total_size": ', '"total_size": 1'))
    open_model(str(folder))
    assert "total_size is 1" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_of_the_config_that_no_tensor_has_is_a_warning(folder, capsys, key):
    open_model(str(write_hf(folder, CONFIG | {key: "bfloat16"}, tensors(CONFIG))))
    assert (
        "config.json says dtype bfloat16, the tensors are float32"
        in capsys.readouterr().err
    )


def test_links_of_the_hub_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    write_hf(snapshot, CONFIG, tensors(CONFIG))
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    assert open_model(str(snapshot)).kind == "hf"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin"], "never opened"),
        (["pytorch_model-00001-of-00002.bin"], "save_pretrained"),
        (["consolidated.00.pth"], "conversion script"),
        (["model.pt"], "never opened"),
        (["flax_model.msgpack"], "Flax"),
        (["tf_model.h5"], "TensorFlow"),
        (["model.gguf"], "path of the .gguf file itself"),
        (["consolidated.safetensors"], "Meta's tensor names"),
        (["adapter_model.safetensors"], "an adapter"),
    ],
)
def test_other_weight_files_are_refused_with_a_way_out(folder, files, message):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in files:
        (folder / name).write_bytes(b"never read")
        (folder / name).chmod(0)
    with pytest.raises(UnsupportedError, match=message):
        open_model(str(folder))


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ([], UsageError, "no config.json"),
        (["params.json", "consolidated.00.pth"], UnsupportedError, "Meta's layout"),
        (["adapter_config.json"], UsageError, "an adapter, not a model"),
        (["checkpoints/1"], UsageError, "a run folder"),
        (["config.json"], CorruptError, "config.json, line 1"),
    ],
)
def test_folder_that_is_no_model_says_what_it_is(folder, files, error, message):
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    with pytest.raises(error, match=message):
        open_model(str(folder))


@pytest.mark.parametrize("suffix", ["qweight", "scales", "weight_scale", "SCB"])
def test_quantised_tensor_names_are_refused(folder, suffix):
    arrays = tensors(CONFIG)
    arrays[Q_PROJ.replace("weight", suffix)] = arrays.pop(Q_PROJ)
    with pytest.raises(UnsupportedError, match="a quantised checkpoint"):
        open_model(str(write_hf(folder, CONFIG, arrays)))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("model.safetensors", UsageError, "give the folder"),
        ("model.bin", UnsupportedError, "never opened"),
        ("notes.txt", UsageError, "not a model folder"),
    ],
)
def test_single_file_that_is_no_gguf_is_refused(tmp_path, name, error, message):
    (tmp_path / name).touch()
    with pytest.raises(error, match=message):
        open_model(str(tmp_path / name))


@pytest.mark.parametrize("path", ["nowhere", "/no/such/folder", "a/b/c", "./a/b"])
def test_path_that_is_nothing_is_refused_without_the_network(path):
    with pytest.raises(UsageError, match="no such file or folder"):
        open_model(path)


def test_hub_id_with_revision_is_fetched_and_noted(tmp_path, monkeypatch):
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return str(write_hf(tmp_path / "snapshots" / "abc", CONFIG, tensors(CONFIG)))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    source = open_model("owner/name@v1")
    assert (asked["name"], asked["revision"]) == ("owner/name", "v1")
    assert source.provenance["revision"] == "abc"


def test_tokenizer_and_template_files_are_kept_verbatim(folder):
    write_hf(folder, CONFIG, tensors(CONFIG))
    kept = {
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"x\r\n",
        "additional_chat_templates/tools.jinja": b"y",
        "generation_config.json": b" {}",
    }
    (folder / "additional_chat_templates").mkdir()
    for name, data in (kept | {"README.md": b"", "training_args.bin": b""}).items():
        (folder / name).write_bytes(data)
    assert open_model(str(folder)).files == kept


def test_sharded_loading_gives_the_same_values_on_every_device(folder):
    source = open_model(str(write_hf(folder, CONFIG, tensors(CONFIG))))
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "tensor"))

    def sharding(path, shape):
        spec = PartitionSpec("fsdp", "tensor") if len(shape) == 2 else PartitionSpec()
        return NamedSharding(mesh, spec)

    params = load_params(source, sharding=sharding)
    kernel = params["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (8, 12)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, load_params(source)))


def test_load_returns_a_model_that_runs(folder):
    model, params = convert.load(str(write_hf(folder, CONFIG, tensors(CONFIG))))
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    logits = jnp.asarray(model.apply({"params": params}, tokens))
    assert logits.shape == (1, 6, 20)
    assert logits.dtype == jnp.float32
