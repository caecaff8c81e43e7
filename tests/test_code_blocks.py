"""The code in the documents is run, or read by the code that would read it from a user."""

import ast
import contextlib
import importlib
import importlib.util
import json
import math
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT
from helpers.commands import make_workdir
from helpers.documents import BLOCKS, FILES, SPANS, Block, blocks_of, commands_of
from helpers.tiny import CONFIG

import train
from jlora.cli import jlora_command
from jlora.cli.arguments import parse
from jlora.config.llama_config import LlamaConfig
from jlora.config.run_config import RowConfig
from jlora.data.read.records import make_record
from jlora.data.read.row_formats import detect_format
from jlora.errors import UsageError
from jlora.formats.tensor_names import all_names
from jlora.lora.target_modules import select_trainable
from jlora.parallel.described_devices import described_devices
from jlora.train.sweep_file import read_sweep

# Programs that are not ours: their flags are not checked.
OTHERS = {"llama-cli", "mlx_lm.fuse", "mlx_lm.generate", "mlx_lm.lora", "ollama"}
OTHERS |= {"export", "python3", "source", "trl", "vllm"}
LANGUAGES = {"bash", "jsonl", "mermaid", "python", "text", "yaml"}
# A Llama with as many layers as any, for what the lora group selects.
DEEP = LlamaConfig.from_hf({**CONFIG, "num_hidden_layers": 80})


def blocks(*languages: str) -> list[Block]:
    """The blocks that are checked."""
    return [b for b in BLOCKS if b.language in languages and not b.unchecked]


def test_blocks_and_their_languages_are_found():
    text = (
        "a\n\n    b\n\n<!-- unchecked: why -->\n```yaml\nc: 1\n```\n\n```sh\nd\n```\n"
    )
    assert [block[1:] for block in blocks_of("p", text)] == [
        (3, "", "b\n", ""),
        (6, "yaml", "c: 1\n", "why"),
        (10, "sh", "d\n", ""),
    ]


def test_every_block_names_a_language_that_is_checked():
    assert [str(b) for b in BLOCKS if b.language not in LANGUAGES] == []


def test_unchecked_blocks_are_few():
    unchecked = [block for block in BLOCKS if block.unchecked]
    print("\n".join(f"{block}: {block.unchecked}" for block in unchecked))
    assert len(unchecked) == 6


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """What the pages speak of: a model, data, the adapter of a run, and examples."""
    import jax

    import jlora

    folder = make_workdir(tmp_path_factory.mktemp("pages"))
    shutil.copy(folder / "eval.jsonl", folder / "held_out.jsonl")
    (folder / "hf").rename(folder / "base")
    (folder / "examples").symlink_to(ROOT / "examples")
    settings = "{model: base, output_dir: run, train: {batch_size: 16}}"
    (folder / "run.yaml").write_text(settings)
    config = jlora.LoraConfig()
    _, params, _ = jlora.load(folder / "base")
    params = jlora.add_lora(params, config, jax.random.key(0))
    jlora.save_adapter(params, config, folder / "run" / "adapter")
    return folder


def page_folder(workdir: Path, page: str, path: Path) -> Path:
    """A folder with links to all of `workdir`, and the YAML files that a page shows."""
    for block in BLOCKS:
        named = re.match(r"# ([\w.]+\.yaml)\n", block.text)
        if block.page == page and named:
            (path / named[1]).write_text(block.text)
    for item in workdir.iterdir():
        if not (path / item.name).exists():
            (path / item.name).symlink_to(item)
    return path


PAGES_WITH_PYTHON = list(dict.fromkeys(block.page for block in blocks("python")))


@pytest.mark.parametrize("page", PAGES_WITH_PYTHON)
def test_python_of_a_page_runs(page, workdir, tmp_path):
    names: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.chdir(page_folder(workdir, page, tmp_path)):
        for block in blocks("python"):
            if block.page == page:
                code = "\n" * block.line + block.text
                exec(compile(code, FILES[page], "exec"), names)


def test_lists_are_quoted_for_every_shell():
    codes = [block.text for block in blocks("bash")] + SPANS
    examples = [file.read_text() for file in ROOT.glob("examples/*.yaml")]
    assert re.findall(r"--[a-z_.]+[ =]\[.*", "\n".join(codes + examples)) == []


def test_python_that_is_not_run_is_python():
    for block in BLOCKS:
        if block.language == "python":
            ast.parse(block.text, str(block))


# Command lines of the pages, and, below, those inside a sentence.
COMMANDS = [
    pytest.param(block.page, words, id=f"{block}: {' '.join(words)[:60]}")
    for block in blocks("bash")
    for words in commands_of(block.text)
]
PHRASES = [
    pytest.param(words, id=span[:60])
    for span in dict.fromkeys(SPANS)
    if re.match(r"jlora [a-z]+ .*-|jlora --|python (-m )?[a-z/_.]+ .|make\b", span)
    for words in commands_of(span)
]


@pytest.mark.parametrize("words", PHRASES)
def test_a_command_in_a_sentence_has_these_flags(words, monkeypatch):
    with contextlib.suppress(Incomplete):
        understand(words, monkeypatch)


@pytest.mark.parametrize(("page", "words"), COMMANDS)
def test_a_command_line_is_understood(page, words, workdir, tmp_path, monkeypatch):
    with contextlib.chdir(page_folder(workdir, page, tmp_path)):
        understand(after_launcher(words), monkeypatch)


def understand(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails unless a command line is one that its program takes."""
    match words:
        case ["jlora", *rest]:
            monkeypatch.setattr(jlora_command, "run_command", only_parse)
            assert jlora_command.main(rest) == 0
        case ["python", "-m", "jlora.serving.lm_harness" as module, *_]:
            assert importlib.util.find_spec(module)  # the flags are the harness's
        case ["python", "-m", module, *rest]:
            check_command(importlib.import_module(module).Arguments, rest)
        case ["python", file, *rest] if "/" not in file:
            name = file.removesuffix(".py")
            check_command(importlib.import_module(name).Arguments, rest)
        case ["python", file, *rest]:
            text = (ROOT / file).read_text("utf-8")
            assert [w for w in rest if w[:2] == "--" and w not in text] == []
        case ["make", *targets]:
            there = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
            assert {t for t in targets if "=" not in t} <= set(there)
        case ["pip", "install", name]:
            assert re.fullmatch(r"(\.|jlora)(\[[a-z,]+\])?", name)
        case [program, *_]:
            assert program in OTHERS


def after_launcher(words: list[str]) -> list[str]:
    """A command line without variables before it, a launcher, and the & after it."""
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[0] in ("srun", "mpirun"):
        words = words[words.index("jlora") :]
    if words[0] == "gcloud":
        words = shlex.split(words[-1].removeprefix("--command="))
    return words[:-1] if words[-1] == "&" else words


class Incomplete(Exception):
    """A command lacks a flag that it needs, as one inside a sentence may."""


def only_parse(_: Any, arguments: type, *, argv: list[str], program: str) -> int:
    """Stands for `run_command`: everything but the command itself."""
    if not {"--help", "--schema"} & set(argv):
        check_command(arguments, argv)
    return 0


def check_command(arguments: type, words: list[str]) -> None:
    """Raises what the command would say before it opens the model."""
    try:
        args: Any = parse(arguments, words)
    except UsageError as error:
        raise Incomplete if str(error).startswith("missing: ") else error from error
    if hasattr(args, "sweep"):
        check_run(args)


def check_run(args: Any) -> None:
    """Raises what a training would say of its settings, on a deep Llama."""
    has_data = args.data.eval is not None or args.data.eval_fraction > 0
    args.train.check_evaluation(has_data=has_data)
    parts = rows_of_a_mesh(args) * args.train.grad_accum_steps
    assert args.train.batch_size % parts == 0, f"a batch is cut into {parts} parts"
    names = [name.key.rpartition(".")[0] for name in all_names(DEEP)]
    for own in read_sweep(args).values():
        select_trainable(own.lora, names, tied=False, vocab_size=64, strict=True)


def rows_of_a_mesh(args: Any) -> int:
    """Into how many parts the mesh of a training cuts a batch, as far as it is given."""
    sizes = [args.mesh.data, args.mesh.fsdp, args.mesh.tensor, args.mesh.context]
    given = math.prod(size for size in sizes if size)
    devices = len(described_devices(args.device)) if args.device else given
    rest = 1 if args.mesh.auto else devices // given
    return (sizes[0] or rest) * (sizes[1] or rest)


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_a_run_or_a_sweep(block, tmp_path, monkeypatch):
    (tmp_path / "file.yaml").write_text(block.text)
    monkeypatch.chdir(tmp_path)
    is_run = yaml.safe_load(block.text).keys() & train.Arguments.__annotations__.keys()
    words = ["--model=base", "--output_dir=run"]
    words += ["--config" if is_run else "--sweep", "file.yaml"]
    check_run(parse(train.Arguments, words))


@pytest.mark.parametrize("block", blocks("jsonl"), ids=str)
def test_jsonl_is_training_data(block):
    for number, line in enumerate(block.text.splitlines()):
        row = json.loads(line)
        found = detect_format(row, RowConfig(), has_template=True, source="", where="")
        make_record(number, row, found)


def test_every_extra_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = "\n".join(file.read_text("utf-8") for file in FILES.values())
    named = set(re.findall(r"'(?:\.|jlora)\[(\w+)\]'", texts))
    assert named == project["optional-dependencies"].keys() - {"dev"}
