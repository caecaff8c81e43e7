import json
import shutil
import socket

import pytest
from helpers.commands import call, train_flags
from helpers.data_cases import write_rows

pytestmark = pytest.mark.usefixtures("in_workdir")


@pytest.fixture(scope="module")
def mistakes(workdir, run, base) -> None:
    """Files that a test of a mistake names."""
    (workdir / "empty").mkdir()
    (workdir / "full").mkdir()
    (workdir / "full" / "thesis.txt").write_text("years of work")
    (workdir / "new_run" / "checkpoints").mkdir(parents=True)
    (workdir / "qwen").mkdir()
    qwen = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    (workdir / "qwen" / "config.json").write_text(json.dumps(qwen))
    shutil.copytree(workdir / "hf", workdir / "cut_off")
    with (workdir / "cut_off" / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    good = {"prompt": "a", "completion": "b"}
    write_rows(
        workdir / "broken.jsonl", [good, '{"prompt": "a", "completion": }', good]
    )
    write_rows(workdir / "keys.jsonl", [good, {"prompt": "a", "complet": "b"}])
    write_rows(workdir / "nothing.jsonl", [])
    (workdir / "bad.yaml").write_text('lora:\n  r: "8"\n')


TRAIN_MISTAKES = [
    ("", 2, "missing: --model"),
    ("--model hf --output_dir r", 2, "--data.train is missing; give"),
    ("{} --data.trian x", 2, "did you mean --data.train?"),
    ("{} --config bad.yaml", 2, "bad.yaml: lora.r is the text '8'"),
    ("{} --config no.yaml", 2, "no.yaml: cannot be read"),
    ("{} --lora.r 0", 2, "r=0"),
    ("{} --lora.r eight", 2, "--lora.r is 'eight'; expected an integer"),
    ("{} --lora.lora_alpha 0", 2, "lora_alpha=0.0"),
    ("{} --lora.lora_dropout 1.0", 2, "lora_dropout=1.0"),
    ("{} --lora.target_modules [q_porj]", 2, "did you mean 'q_proj'?"),
    ("{} --lora.target_modules q_proj", 2, "write [q_proj]"),
    ("{} --lora.target_modules q_proj,v_proj", 2, "write [q_proj,v_proj]"),
    ("{} --lora.target_modules (", 2, "not a regular expression"),
    ("{} --lora.lora_bias true", 3, "lora_bias=True (jlora has no bias on lora_B)"),
    ("{} --lora.layer_replication [[0,2]]", 3, "layer_replication=[[0, 2]]"),
    (
        "{} --lora.target_modules [q_proj] --lora.layers_to_transform [1,99]",
        2,
        "layers_to_transform: 99",
    ),
    ("{} --lora.bias all", 3, "lora.bias='all'"),
    ("{} --lora.init_lora_weights eva", 3, "init_lora_weights='eva'"),
    ("{} --lora.modules_to_save [lm_haed]", 2, "did you mean 'lm_head'?"),
    ("{} --lora.trainable_token_indices [1,1]", 2, "1 is given twice"),
    ("{} --lora.ensure_weight_tying", 2, "leave it out"),
    ("{} --compute.attention cudnn", 2, "needs an NVIDIA GPU"),
    ("{} --data.format alpaka", 2, "expected one of auto, text"),
    ("{} --data.train missing.jsonl", 2, "missing.jsonl: no such file"),
    ("{} --data.train empty", 2, "empty is a folder"),
    ("{} --data.train nothing.jsonl", 2, "no records"),
    ("{} --data.train broken.jsonl", 4, "line 2, column 31: not JSON"),
    ("{} --data.train keys.jsonl", 4, "line 2: no completion"),
    ("{} --data.eval missing.jsonl", 2, "missing.jsonl: no such file"),
    ("{} --data.train_on assistant", 2, "choose auto, completion, all"),
    ("{} --data.seq_len 129", 2, "data.seq_len=129 exceeds"),
    ("{} --data.seq_len 1", 2, "data.seq_len=1; expected at least 2"),
    ("{} --train.batch_size 12", 2, "does not divide"),
    ("{} --train.batch_size 8 --train.grad_accum_steps 3", 2, "not a multiple"),
    (
        "{} --mesh.data 9",
        2,
        "data=9, fsdp=1, tensor=1, context=1 does not make 8 devices",
    ),
    ("{} --mesh.data 1 --mesh.tensor 8", 2, "num_key_value_heads=2"),
    ("{} --seed -1", 2, "seed=-1"),
    ("{} --seed 4294967296", 2, "seed=4294967296; expected"),
    ("{} --lora.r 1000000000000", 2, "r=1000000000000; expected"),
    ("{} --lora.target_modules []", 2, "target_modules=[] is empty"),
    ("{} --train.num_epochs 0 --train.max_steps 0", 2, "num_epochs=0"),
    ("{} --data.split_turns", 2, "split_turns has no effect on train.jsonl"),
    (
        '{} --optim.group_weight_decay {"magnitude":1}',
        2,
        "nothing of that group is trained; there is lora_A, lora_B",
    ),
    ("{} --resume sometimes", 2, "expected one of auto, never, must"),
    ("{} --model nowhere", 2, "nowhere: no such file or folder"),
    ("{} --model empty", 2, "empty: holds no config.json"),
    ("{} --model train.jsonl", 2, "not a model folder"),
    ("{} --model qwen", 3, "Qwen2ForCausalLM"),
    ("{} --model cut_off", 4, "model.safetensors"),
    ("{} --output_dir hf", 2, "hf: holds a model"),
    ("{} --output_dir train.jsonl", 2, "train.jsonl: exists and is not a folder"),
    ("{} --output_dir /dev/null/run", 2, "/dev/null/run: "),
    ("{} --init_adapter empty", 2, "neither adapter_config.json"),
    ("{} --data.train " + "a" * 300, 2, "File name too long"),
    ("{} --init_adapter nowhere", 2, "nowhere: no such file or folder"),
    ("{} --init_adapter new_run", 2, "nor a checkpoint"),
]


GENERATE_MISTAKES = [
    ("", 2, "missing: --model"),
    ("--model hf", 2, "--prompts FILE or --chat"),
    ("--model hf --prompt=", 2, "the prompt is empty"),
    ("--model hf --prompt a --max_new_tokens 0", 2, "max_new_tokens=0"),
    ("--model hf --prompt a --max_new_tokens 128", 2, "at most max_new_tokens=127"),
    ("--model hf --prompt " + "a" * 200, 2, "shorten it"),
    ("--model hf --prompt a --temperature -1", 2, "temperature=-1.0"),
    ("--model hf --prompt a --seed 4294967296", 2, "seed=4294967296; expected"),
    ("--model hf --prompt a --adapter empty", 2, "neither adapter_config.json"),
    ("--model hf --prompt a --adapter hf", 2, "neither adapter_config.json"),
    ("--model nowhere --prompt a", 2, "no such file or folder"),
]


EVALUATE_MISTAKES = [
    ("--model hf", 2, "missing: --data"),
    ("--model hf --data eval.jsonl --data.seq_len 512", 2, "seq_len=512 exceeds"),
    ("--model hf --data eval.jsonl --batch_size 0", 2, "batch_size=0"),
    ("--model hf --data eval.jsonl --show --generate 2", 2, "prints data alone"),
    ("--model hf --data eval.jsonl --data.seq_len 0", 2, "seq_len=0"),
    ("--model hf --data broken.jsonl --data.seq_len 64", 4, "line 2, column 31"),
    (
        "--model hf --data eval.jsonl --data.seq_len 64 --adapter new_run",
        2,
        "checkpoint",
    ),
]


CONVERT_MISTAKES = [
    ("from_hf", "", 2, "missing: SRC"),
    ("from_hf", "hf", 2, "missing: OUT"),
    ("from_hf", "hf base", 2, "add --overwrite"),
    ("from_hf", "hf full --overwrite", 2, "choose another OUT"),
    ("from_hf", "hf hf --overwrite", 2, "is or holds the source"),
    ("from_hf", "hf /dev/null/x", 2, "/dev/null"),
    ("from_hf", "hf x --overwrit", 2, "did you mean --overwrite?"),
    ("from_hf", "hf x y", 2, "unexpected: y"),
    ("from_hf", "hf x --dtype bf16", 2, "did you mean 'bfloat16'?"),
    ("from_hf", "hf x --quantize nf3", 2, "expected one of none, fp8, int8, nf4"),
    ("from_hf", "qwen x", 3, "Qwen2ForCausalLM"),
    ("from_hf", "cut_off x", 4, "model.safetensors"),
    ("info", "nowhere", 2, "no such file or folder"),
    ("info", "a" * 300, 2, "File name too long"),
    ("to_peft", "x --adapter " + "a" * 300, 2, "File name too long"),
    ("to_hf", "x --model hf", 2, "missing: OUT (Folder to write"),
    ("to_hf", "x --model hf --adapter empty", 2, "neither adapter_config.json"),
    ("to_hf", "base --model hf --adapter run", 2, "add --overwrite"),
    ("to_peft", "x --adapter hf", 2, "neither adapter_config.json"),
    ("to_peft", "x --adapter run --for vlm", 2, "--for is 'vlm'; expected one of"),
]


MISTAKES = [
    *(("train", *mistake) for mistake in TRAIN_MISTAKES),
    *(("generate", *mistake) for mistake in GENERATE_MISTAKES),
    *(("evaluate", *mistake) for mistake in EVALUATE_MISTAKES),
    *((f"convert.{name}", *mistake) for name, *mistake in CONVERT_MISTAKES),
]


@pytest.mark.usefixtures("mistakes")
@pytest.mark.parametrize(
    ("command", "flags", "status", "message"),
    MISTAKES,
    ids=[f"{name} {flags[:60]}" for name, flags, *_ in MISTAKES],
)
def test_a_mistake_is_one_message_and_its_status(
    command, flags, status, message, workdir
):
    given = flags.split()
    if "{}" in given:
        given = [*train_flags("new"), *given[1:]]
    done = call(command, *given)
    assert (done.status, message in done.err) == (status, True), done.err
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    assert not (workdir / "x").exists()
    assert not (workdir / "new" / "checkpoints").exists()


@pytest.fixture
def offline(monkeypatch) -> None:
    """Makes everything that asks the network fail the test."""

    def refuse(*words: object, **_: object) -> None:
        pytest.fail(f"the network was asked: {words}")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("convert.from_hf", "demo/bse x"),
        ("convert.info", "demo/bse"),
        ("convert.to_hf", "x --model demo/bse --adapter run"),
        ("convert.to_hf", "x --model hf --adapter demo/bse"),
        ("convert.to_peft", "x --adapter demo/bse"),
        ("convert.combine", "x --adapters [demo/bse,run] --weights [1,1]"),
        ("generate", "--model demo/bse --prompt a"),
        ("generate", "--model hf --adapter demo/bse --prompt a"),
        ("evaluate", "--model demo/bse --data eval.jsonl"),
        ("evaluate", "--model hf --data demo/bse"),
        ("train", "--model demo/bse --output_dir new --data.train train.jsonl"),
        ("train", "--model hf --output_dir new --data.train demo/bse"),
        (
            "train",
            "--model hf --output_dir new --data.train train.jsonl --init_adapter demo/bse",
        ),
    ],
)
def test_a_mistyped_path_is_not_asked_for_at_the_hub(command, flags, workdir, run):
    (workdir / "demo" / "base").mkdir(parents=True, exist_ok=True)
    done = call(command, *flags.split())
    assert done.status == 2
    assert "demo/bse: no such file" in done.err
    assert "did you mean 'demo/base'?" in done.err


@pytest.mark.usefixtures("offline")
def test_the_mistyped_base_of_an_adapter_is_not_asked_for_at_the_hub(
    run, workdir, tmp_path
):
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    (workdir / "demo").mkdir(exist_ok=True)
    changes = {"base_model_name_or_path": "demo/bse", "init_lora_weights": "pissa"}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    done = call("convert.to_peft", tmp_path / "out", "--adapter", tmp_path / "adapter")
    assert (done.status, "demo/bse: no such file" in done.err) == (2, True)
