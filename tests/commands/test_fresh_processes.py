import pytest
from helpers import ROOT
from helpers.commands import finish, start_python, train_flags

pytestmark = pytest.mark.usefixtures("in_workdir")

PURITY = """
import importlib, pkgutil, sys

def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        raise SystemExit(f"opened a socket: {event} {args}")

sys.addaudithook(refuse)
import convert, jlora, train, generate, evaluate
from jlora.cli.command import run_command
for package in (convert, jlora):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        # The harness is an extra of its own.
        if module.name != "jlora.serving.lm_harness":
            importlib.import_module(module.name)
for module, flags in (
    (train, sys.argv[1:]),
    (evaluate, "--model hf --data eval.jsonl --data.seq_len 64 --adapter pure".split()),
    (generate, "--model hf --prompt a --max_new_tokens 4 --adapter pure".split()),
):
    assert run_command(module.main, module.Arguments, argv=flags) == 0
heavy = {"torch", "tensorflow", "transformers", "datasets", "peft", "huggingface_hub"}
print("loaded:", sorted(heavy & {name.split(".")[0] for name in sys.modules}))
"""


def test_local_paths_open_no_socket_and_load_no_other_framework():
    flags = train_flags("pure", "--train.max_steps", 2, "--data.eval", "eval.jsonl")
    status, out, err = finish(start_python("-c", PURITY, *flags))
    assert status == 0, err
    assert out.splitlines()[-1] == "loaded: []"


IN_TIME = """
import importlib, sys
import jax
from jlora.cli.command import run_command

def keep_freed_memory():
    jax.config.update("jax_num_cpu_devices", 1)  # an error once there are devices
    raise SystemExit("in time")

module = importlib.import_module(sys.argv[1])
module.keep_freed_memory = keep_freed_memory
run_command(module.main, module.Arguments, argv=sys.argv[2:])
"""


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_memory_is_kept_before_any_use_of_a_device(name):
    flags = {
        "train": train_flags("never"),
        "evaluate": ["--model", "hf", "--data", "eval.jsonl", "--data.seq_len", 64],
    }
    done = finish(start_python("-c", IN_TIME, name, *flags[name]))
    assert done.err.splitlines()[-1:] == ["in time"]


def test_a_command_is_a_program():
    status, out, err = finish(start_python("-m", "convert.info", "nowhere"))
    assert (status, out) == (2, "")
    assert err.startswith("error: nowhere: no such file or folder")
    assert err.count("\n") == 1


def test_a_second_start_of_generate_compiles_nothing(tmp_path):
    script = ROOT / "generate.py"
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    made, outs = [], []
    for prompt, top_p in (("What is", 0.9), ("Another text", 0.5)):
        flags = ["--model", "hf", "--prompt", prompt, "--max_new_tokens", 6]
        done = finish(
            start_python(
                script, *flags, "--temperature", 1.0, "--top_p", top_p, **cache
            )
        )
        assert done.status == 0, done.err
        made.append({path.name for path in tmp_path.glob("*-cache")})
        outs.append(done.out)
    assert len(made[0]) > 2
    assert made[1] == made[0]
    assert outs[0] != outs[1]
