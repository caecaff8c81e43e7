"""How fast, and in how much memory, a checkpoint is converted and loaded.

    python benchmarks/convert_speed.py [--layers 2] [--folder DIR] [--times 3]

writes a checkpoint of Llama-3-8B's shapes with a few layers (two: 3 GB, of which the
embedding and the head are 2.1) into a temporary folder, and prints a JSON line for every
way to read it, models onto JAX's default device: MB of the source's files per second, the
ratio to plain sequential reads of the same files by one thread (into one buffer, and into
memory that is kept), and the peak of the process's memory above what it keeps there, in
units of the largest tensor. Each is a process of its own, run several times; the best time
counts, and plain reads are timed beside every one, as other work on the machine comes and
goes. Each finds free memory that a process has just used, enough for the result and, from
disk, the page cache too.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

BUFFER_BYTES = 16 << 20
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def write_checkpoint(folder: Path, layers: int) -> int:
    """Writes an HF folder of random bfloat16 weights; returns its largest tensor's bytes."""
    from jlora.config.llama_config import LlamaConfig
    from jlora.formats.safetensors_file import Spec, write_safetensors
    from jlora.formats.tensor_names import all_names

    config = CONFIG | {"num_hidden_layers": layers}
    specs = {
        name.key: Spec(name.hf_shape, np.dtype(ml_dtypes.bfloat16))
        for name in all_names(LlamaConfig.from_hf(config))
    }
    rng = np.random.default_rng(0)
    pattern = (rng.standard_normal(1 << 22, np.float32) * 0.02).astype("bfloat16")

    def draw(key: str) -> np.ndarray:
        # Repeated: drawing gigabytes would take longer than all that is measured.
        return np.resize(pattern, specs[key].shape)

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", specs, draw)
    return max(spec.nbytes for spec in specs.values())


def data_files(folder: Path) -> list[Path]:
    """Returns the files that hold weights."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in found if path.suffix == ".safetensors"]


def read_plainly(folder: Path) -> None:
    """Reads every file from start to end into one buffer."""
    memory = bytearray(BUFFER_BYTES)
    for path in data_files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(memory):
                pass


def read_and_keep(folder: Path) -> list[np.ndarray]:
    """Reads every file from start to end into memory of its own."""
    return [np.fromfile(path, np.uint8) for path in data_files(folder)]


def provide_memory(size: int) -> None:
    """Has the machine's free memory at hand: a virtual machine may have returned it.

    To get it back from the host takes several times as long as what is measured.
    """
    size = min(
        size, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4
    )
    np.empty(size, np.uint8)[::4096] = 0


def drop_from_cache(folder: Path) -> None:
    """Makes the next read of the files come from the disk."""
    for path in data_files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def work(kind: str, folder: Path) -> tuple[Callable[[], Any], Path]:
    """Returns what to time, and the folder whose files it reads."""
    from jlora.formats.base.base_writer import write_base
    from jlora.formats.load_params import load_params
    from jlora.formats.open_model import open_model

    source, base = folder / "hf", folder / "base"
    if kind in ("convert", "nf4"):
        out, quantize = folder / "again", "none" if kind == "convert" else kind
        shutil.rmtree(out, ignore_errors=True)
        return (
            lambda: write_base(open_model(str(source)), out, "keep", False, quantize),
            source,
        )
    read = base if kind == "base" else source
    return lambda: load_params(open_model(str(read))), read


def measure(kind: str, folder: Path, cold: bool) -> dict[str, Any]:
    """Times one way in this process, with plain reads before and after it."""
    import jax

    jax.device_put(np.zeros(1)).block_until_ready()
    function, read = work(kind, folder)
    size = sum(path.stat().st_size for path in data_files(read))

    def timed(function: Callable[[], Any]) -> tuple[float, float, Any]:
        if cold:
            drop_from_cache(read)
        provide_memory((3 if cold else 1) * size)  # twice was too little at times
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        start, processor = time.perf_counter(), time.process_time()
        result = function()
        return time.perf_counter() - start, time.process_time() - processor, result

    plain, *_ = timed(lambda: read_plainly(read))
    plain_kept, *_ = timed(lambda: len(read_and_keep(read)))
    rss = memory("VmRSS")
    elapsed, processor, kept = timed(function)
    peak = memory("VmHWM") - rss
    plain = min(plain, timed(lambda: read_plainly(read))[0])
    plain_kept = min(plain_kept, timed(lambda: len(read_and_keep(read)))[0])
    on_host = jax.default_backend() == "cpu"
    arrays = [leaf for leaf in jax.tree.leaves(kept) if isinstance(leaf, jax.Array)]
    held = sum(leaf.nbytes for leaf in arrays) if on_host else 0
    return {
        "device": jax.devices()[0].device_kind,
        "seconds": elapsed,
        "processor_seconds": processor,
        "plain": plain,
        "plain_kept": plain_kept,
        "bytes": size,
        "above": peak - held,
    }


def memory(field: str) -> int:
    """Returns a figure of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(kind: str, folder: Path, largest: int, times: int, cold: bool) -> None:
    """Prints the line of one way: the best of several processes."""
    command = [sys.executable, __file__, "--child", kind, "--folder", str(folder)]
    runs = []
    for _ in range(times):
        done = subprocess.run(
            command + ["--cold"] * cold, capture_output=True, text=True, check=True
        )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    seconds, plain, plain_kept = (
        min(run[name] for run in runs) for name in ("seconds", "plain", "plain_kept")
    )
    size = runs[0]["bytes"]
    line = {
        "what": kind,
        "from": "disk" if cold else "page cache",
        "to": runs[0]["device"] if kind in ("load", "base") else "disk",
        "megabytes": round(size / 1e6),
        "megabytes_per_second": round(size / seconds / 1e6),
        "plain_read": round(size / plain / 1e6),
        "plain_read_kept": round(size / plain_kept / 1e6),
        "ratio": round(plain / seconds, 3),
        "ratio_kept": round(plain_kept / seconds, 3),
        "processor_seconds": round(min(run["processor_seconds"] for run in runs), 2),
        "peak_above_result_in_largest_tensors": round(
            max(run["above"] for run in runs) / largest, 2
        ),
        "largest_tensor_megabytes": round(largest / 1e6),
        "processors": os.cpu_count(),
    }
    print(json.dumps(line), flush=True)


def main() -> None:
    """Writes the checkpoint, and measures every way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.folder, arguments.cold)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        largest = write_checkpoint(folder / "hf", arguments.layers)
        report("load", folder, largest, arguments.times, cold=False)
        report("nf4", folder, largest, arguments.times, cold=False)
        report("convert", folder, largest, arguments.times, cold=False)
        (folder / "again").rename(folder / "base")
        report("base", folder, largest, arguments.times, cold=False)
        report("load", folder, largest, arguments.times, cold=True)
        report("base", folder, largest, arguments.times, cold=True)


if __name__ == "__main__":
    main()
