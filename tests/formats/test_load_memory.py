import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import ROOT
from helpers.quantized_files import BNB, FP8, is_linear, write_fp8, write_nf4
from helpers.tiny import CONFIG, tensors, write_hf

from jlora.config.llama_config import LlamaConfig
from jlora.formats.array_blocks import MAX_BUFFER_BYTES, THREADS
from jlora.formats.safetensors_file import Spec, read_header, write_safetensors
from jlora.formats.tensor_names import all_names

# Llama-3-70B's proportions (the head is 1.2 layers), small: a layer takes 107 MB, where
# one of 70B takes 1.7 GB. What the threads' buffers take does not grow with the model.
FP8_BLOCKS = FP8 | {"weight_block_size": [128, 128]}
BUFFERS = max(64 << 20, THREADS * MAX_BUFFER_BYTES)
SCALED = CONFIG | {
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "num_attention_heads": 16,
    "vocab_size": 32768,
}
# Converts a tiny model, so that libraries and threads are there; then the other one with
# so many bytes more, which the system enforces.
CONVERT_WITHIN = """
import resource, sys
from pathlib import Path
from convert import from_hf
from jlora.cli.command import run_command

def convert(source, out, *more):
    return run_command(from_hf.main, from_hf.Arguments,
                       argv=[source, out, *more])

tiny, source, out, allowed, *more = sys.argv[1:]
assert convert(tiny, out + ".tiny", *more) == 0
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
limit = int(status["VmData"].split()[0]) * 1024 + int(allowed)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
sys.exit(convert(source, out, *more))
"""


def write_bfloat16(folder, config):
    dtype = np.dtype(ml_dtypes.bfloat16)
    names = all_names(LlamaConfig.from_hf(config))
    specs = {name.key: Spec(name.hf_shape, dtype) for name in names}
    values = np.random.default_rng(0).normal(size=1 << 20).astype(dtype)
    write_hf(folder, config, {})
    write_safetensors(
        folder / "model.safetensors",
        specs,
        lambda key: np.resize(values, specs[key].shape),
    )
    return folder


def write_quantized(folder, config, settings):
    """The same in nf4 or fp8; every weight of a shape has the same random codes."""
    is_nf4 = settings is BNB
    block = (128, 128)
    arrays: dict[str, np.ndarray] = {}
    made: dict[tuple[int, ...], dict[str, np.ndarray]] = {}
    for name in all_names(LlamaConfig.from_hf(config)):
        shape = name.hf_shape
        if not is_linear(name.key):
            arrays[name.key] = np.ones(shape, ml_dtypes.bfloat16)
            continue
        if shape not in made:
            values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
            made[shape] = (
                write_nf4("", values[:64], nested=True)
                if is_nf4
                else write_fp8("weight", values, block, "weight_scale_inv")
            )
        stem = name.key.removesuffix("" if is_nf4 else "weight")
        arrays |= {stem + part: array for part, array in made[shape].items()}
        if is_nf4:
            arrays |= stretched(name.key, shape, arrays)
    declared = config | {"quantization_config": settings, "torch_dtype": "bfloat16"}
    return write_hf(folder, declared, arrays)


def stretched(key, shape, arrays):
    """The tensors of 64 rows in nf4, repeated for more rows."""
    name = f"{key}.quant_state.bitsandbytes__nf4"
    state = json.loads(arrays[name].tobytes()) | {"shape": list(shape)}
    blocks = shape[0] * shape[1] // 64
    return {
        key: np.resize(arrays[key], (blocks * 32, 1)),
        f"{key}.absmax": np.resize(arrays[f"{key}.absmax"], blocks),
        f"{key}.nested_absmax": np.resize(
            arrays[f"{key}.nested_absmax"], math.ceil(blocks / 256)
        ),
        name: np.frombuffer(json.dumps(state).encode(), np.uint8),
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scaled")
    small = CONFIG | {"hidden_size": 64, "intermediate_size": 64}
    yield (
        write_bfloat16(folder / "tiny", small),
        write_bfloat16(folder / "scaled", SCALED),
    )
    shutil.rmtree(folder)


def convert_within(sources, out, layers, *more):
    tiny, scaled = sources
    header = read_header(scaled / "model.safetensors", quantised=True)
    layer = sum(spec.nbytes for key, spec in header.items() if ".layers.0." in key)
    words = [*map(str, (tiny, scaled, out, layers * layer + BUFFERS)), *more]
    # Small stacks: the system counts them as the process's data.
    command = ["sh", "-c", 'ulimit -s 1024; exec "$@"', "sh", sys.executable, "-c"]
    return subprocess.run(
        [*command, CONVERT_WITHIN, *words], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
@pytest.mark.parametrize("quantize", ["nf4", "fp8"])
def test_a_model_is_quantised_within_the_memory_of_two_layers(
    sources, tmp_path, quantize
):
    done = convert_within(sources, tmp_path / "out", 2, "--quantize", quantize)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "jlora.json").is_file()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
@pytest.mark.parametrize(
    ("settings", "dtype", "layers"),
    # Of layers as they are stored: one of nf4 takes 30 MB, one of fp8 54 MB. In bfloat16
    # one takes 107 MB, its largest tensor in float32 59 MB, and the embedding 134 MB.
    [(BNB, "keep", 5), (BNB, "bfloat16", 7), (FP8_BLOCKS, "keep", 4)],
    ids=["nf4", "dequantised nf4", "fp8"],
)
def test_a_quantised_model_is_converted_within_the_memory_of_two_layers(
    tmp_path, settings, dtype, layers
):
    small = CONFIG | {"hidden_size": 64, "intermediate_size": 64}
    sources = (
        write_quantized(tmp_path / "tiny", small, settings),
        write_quantized(tmp_path / "scaled", SCALED, settings),
    )
    done = convert_within(sources, tmp_path / "out", layers, "--dtype", dtype)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "jlora.json").is_file()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_a_conversion_that_runs_out_of_memory_is_told_and_leaves_nothing(
    sources, tmp_path
):
    done = convert_within(sources, tmp_path / "out", 0, "--quantize", "nf4")
    assert done.returncode == 5, done.stderr
    assert "memory" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


PROGRAM = """
import resource, sys
from convert.from_hf import Arguments, main
from jlora.formats.describe import describe_model
from jlora.formats.load_params import load_params
from jlora.formats.open_model import open_model

folder, load = sys.argv[1], sys.argv[2] == "load"

def work(name):
    if load:
        load_params(open_model(f"{folder}/{name}"))
    else:
        main(Arguments(f"{folder}/{name}", f"{folder}/base-{name}"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = work("small")  # what the libraries take whatever the model's size
print("peak", (work("large") - before) * 1024)
"""


def write_large(folder: Path) -> dict[str, int]:
    config = CONFIG | {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 1000,
    }
    rng = np.random.default_rng(0)
    specs = {
        name.key: Spec(name.hf_shape, np.dtype(np.float32))
        for name in all_names(LlamaConfig.from_hf(config))
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(
        folder / "model.safetensors",
        specs,
        lambda key: rng.random(specs[key].shape, np.float32),
    )
    sizes = {key: spec.nbytes for key, spec in specs.items()}
    layer = sum(size for key, size in sizes.items() if "layers.0." in key)
    return {
        "total": sum(sizes.values()),
        "layer": layer,
        "tensor": max(sizes.values()),
    }


@pytest.mark.slow
@pytest.mark.parametrize("work", ["convert", "load"])
def test_peak_memory_stays_small(tmp_path, work):
    write_hf(tmp_path / "small", CONFIG, tensors(CONFIG))
    size = write_large(tmp_path / "large")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), work],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    peak = int(result.stdout.split("peak ")[1])
    kept = size["layer"] if work == "convert" else size["total"]
    assert peak < kept + 2 * size["tensor"]
