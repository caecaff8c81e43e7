import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = ("train", "generate", "evaluate")
# A module may import rows above its own; `data` is a package whose files import each other.
ROWS = (
    {"errors", "matmul", "elementwise"},
    {
        "strict_json",
        "strict_yaml",
        "flags",
        "fields",
        "compiled",
        "memory",
        "processes",
    },
    {"architectures", "rope_config", "peft_fields"},
    {"config"},
    {"settings"},
    {"rope", "sharding", "targets", "quantize", "dropout"},
    {"splash", "blocks", "hopper"},
    {"attention", "hopper_dropout", "hopper_products"},
    {"narrow", "hopper_swiglu"},
    {"fused"},
    {"lora"},
    {"offload"},
    {"lora_init", "merging", "model"},
    {"digests", "loss", "optimizer", "data", "report", "cli", "generation"},
    {"checkpoint"},
    {"prefetch", "sweep_file", "resuming"},
    {"training"},
    {"plan", "sweep"},
    {"loop"},
    {"fit"},
)
OWNERS = {
    "flax": ("jlora.lora.lora_dense", "jlora.model.llama", "jlora.parallel.sharding"),
    "optax": ("jlora.train.optimizer", "jlora.train.step"),
    "orbax": ("jlora.train.checkpoint",),
    "tensorstore": ("jlora.train.checkpoint",),
    "tokenizers": ("jlora.data", "jlora.formats.gguf.gguf_tokenizer"),
    "jinja2": ("jlora.data",),
    "pyarrow": ("jlora.data.read.columnar",),
    "safetensors": ("convert",),
    "gguf": ("convert",),
    "huggingface_hub": ("convert",),
    "rich": ("jlora.report.run_report",),
    "matplotlib": ("jlora.report.run_report",),
    "jsonargparse": ("jlora.cli.command",),
    "torch": (),
    "transformers": (),
    "peft": (),
    "tensorflow": (),
    "pickle": (),
}
FORBIDDEN_CALLS = ("eval", "exec", "torch.load", "pickle.load", "pickle.loads")


def sources() -> dict[str, Path]:
    files = [ROOT / f"{name}.py" for name in COMMANDS]
    files += sorted((ROOT / "jlora").rglob("*.py"))
    files += sorted((ROOT / "convert").rglob("*.py"))
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): file
        for file in files
        if file.exists()
    }


def imports(tree: ast.AST, module: str) -> Iterator[str]:
    package = module.removesuffix(".__init__").split(".")
    if not module.endswith("__init__"):
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*start, *filter(None, [node.module])])
            # `from jlora import model` names a module, `from jlora.model.llama import Llama`
            # something inside one: the longer name serves both.
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def row(module: str) -> int | None:
    part = module.split(".")[1] if "." in module else ""
    return next((i for i, names in enumerate(ROWS) if part in names), None)


def is_within(module: str, owner: str) -> bool:
    return module == owner or module.startswith(f"{owner}.")


def violations(module: str, code: str) -> list[str]:
    tree = ast.parse(code)
    found = []
    for name in imports(tree, module):
        top = name.split(".")[0]
        if top in OWNERS and not any(is_within(module, o) for o in OWNERS[top]):
            found.append(f"{module} imports {name}, which belongs to {OWNERS[top]}")
        if top in COMMANDS or (top == "convert" and module.startswith("jlora")):
            found.append(f"{module} imports {name}, which is above it")
        if top == "jlora" and module.startswith("jlora."):
            found += jlora_violations(module, name)
    return found + [
        f"{module} calls {call}" for call in calls(tree) if is_forbidden(call)
    ]


def jlora_violations(module: str, name: str) -> list[str]:
    if module == "jlora.__init__":
        return []
    own, other = row(module), row(name)
    if own is None:
        return [f"{module} is in no row"]
    if other is None:
        return [f"{module} imports {name}, which is in no row"]
    same_package = module.startswith("jlora.data.") and is_within(name, "jlora.data")
    if other >= own and not same_package:
        return [f"{module} imports {name}, which is not in a row above it"]
    return []


def calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            pickled = any(keyword.arg == "allow_pickle" for keyword in node.keywords)
            yield ast.unparse(node.func) + (" with allow_pickle" if pickled else "")


def is_forbidden(call: str) -> bool:
    return call in FORBIDDEN_CALLS or call.endswith("allow_pickle")


@pytest.mark.parametrize("module", sources())
def test_imports_point_down_and_third_parties_have_one_owner(module):
    assert violations(module, sources()[module].read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("module", "code", "message"),
    [
        (
            "jlora.model.rotary",
            "from jlora.model.llama import Llama",
            "not in a row above",
        ),
        ("jlora.model.rotary", "from jlora import attention", "not in a row above"),
        ("jlora.lora.lora_dense", "from . import model", "not in a row above"),
        (
            "jlora.lora.lora_dense",
            "def f():\n    import jlora.model.llama",
            "not in a row above",
        ),
        (
            "jlora.data.tokenize.tokenized_rows",
            "from jlora.report.run_report import bar",
            "not in a row above",
        ),
        ("jlora.utils", "from jlora.errors import JloraError", "in no row"),
        ("jlora.lora.lora_dense", "from jlora.utils import helper", "in no row"),
        (
            "jlora.train.memory_estimate",
            "from jlora.formats.tensor_names import Name",
            "above it",
        ),
        ("convert.to_hf", "from train import main", "above it"),
        ("jlora.train.step", "import flax.linen as nn", "belongs to"),
        ("jlora.formats.model_source", "import orbax.checkpoint", "belongs to"),
        ("train", "import torch", "belongs to"),
        ("jlora.formats.peft.attach_adapter", "import pickle", "belongs to"),
        ("jlora.cli.command", "eval('1')", "calls eval"),
        (
            "jlora.formats.peft.attach_adapter",
            "np.load(f, allow_pickle=True)",
            "calls np.load",
        ),
    ],
)
def test_a_violation_is_found(module, code, message):
    assert any(message in text for text in violations(module, code))


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("jlora.train.step", "from jlora.model.llama import Llama\nimport optax"),
        (
            "jlora.data.tokenize.tokenized_rows",
            "from jlora.data.read.records import read",
        ),
        ("convert.to_hf", "from jlora import merge\nimport safetensors.numpy"),
        ("train", "import convert\nfrom jlora.train.step import make_train_step"),
    ],
)
def test_an_import_of_a_lower_layer_is_allowed(module, code):
    assert violations(module, code) == []
