import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom up: a module may import modules of its own package and of those before.
PACKAGES = (
    "jlora.errors",
    "jlora.hub",
    "jlora.limited_process",
    "jlora.limited_regex",
    "jlora.config",
    "jlora.cli",
    "jlora.parallel",
    "jlora.report",
    "jlora.ops",
    "jlora.lora",
    "jlora.model",
    "jlora.data",
    "jlora.formats",
    "jlora.train",
    "jlora.loading",
    "jlora.fitting",
    "jlora.publishing",
    "jlora.serving",
)
# Inside jlora.data, likewise; and only files of jlora.ops.hopper are above those of ops.
STATIONS = ("read", "chat", "tokenize", "cache", "batch")
COMMANDS = ("train", "generate", "evaluate", "serve", "report", "convert")
OWNERS = {
    "flax": ("jlora.lora", "jlora.model", "jlora.parallel"),
    "optax": ("jlora.train",),
    "orbax": ("jlora.train.checkpoint",),
    "tokenizers": ("jlora.data", "jlora.formats.gguf.gguf_tokenizer"),
    "jinja2": ("jlora.data", "jlora.report"),
    "pyarrow": ("jlora.data",),
    "safetensors": ("jlora.formats",),
    "gguf": ("jlora.formats",),
    "huggingface_hub": ("jlora.hub",),
    "rich": ("jlora.report",),
    "yaml": ("jlora.cli", "jlora.formats.model_card", "jlora.report", "jlora.train"),
    "sacrebleu": ("jlora.serving",),
    **dict.fromkeys(("wandb", "tensorboardX", "trackio"), ("jlora.report.trackers",)),
    "starlette": ("jlora.serving",),
    "lm_eval": ("jlora.serving.lm_harness",),
    "uvicorn": ("jlora.serving", "serve"),
    "torch": (),
    "transformers": (),
    "peft": (),
    "tensorflow": (),
    "pickle": (),
}
FORBIDDEN_CALLS = ("eval", "exec", "torch.load", "pickle.load", "pickle.loads")
Sources = Mapping[str, str]


def sources() -> dict[str, str]:
    """Returns {module name: code} of the library and the commands."""
    files = [file for name in COMMANDS for file in ROOT.glob(f"{name}.py")]
    files += (ROOT / "jlora").rglob("*.py")
    files += (ROOT / "convert").rglob("*.py")
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(
            ".__init__"
        ): file.read_text("utf-8")
        for file in sorted(files)
    }


def imports(code: str, module: str, known: Sources) -> Iterator[str]:
    """Yields every imported module, those inside functions included."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative imports are not used"
            # `from jlora.ops import attention` names a module, `from jlora.ops.attention
            # import attend` something inside one.
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in known else str(node.module)


def is_within(module: str, owner: str) -> bool:
    return module == owner or module.startswith(f"{owner}.")


def row(module: str) -> int | None:
    rows = (i for i, owner in enumerate(PACKAGES) if is_within(module, owner))
    return next(rows, None)


def violations(module: str, code: str, known: Sources) -> list[str]:
    found = []
    for name in imports(code, module, known):
        top = name.split(".")[0]
        if top in OWNERS and not any(is_within(module, o) for o in OWNERS[top]):
            found.append(f"{module} imports {name}, which belongs to {OWNERS[top]}")
        if top in COMMANDS:
            found.append(f"{module} imports {name}, which is a command")
        if top == "jlora" and is_within(module, "jlora") and module != "jlora":
            found += upward(module, name)
    tree = ast.parse(code)
    return found + [f"{module} calls {c}" for c in calls(tree) if is_forbidden(c)]


def upward(module: str, name: str) -> list[str]:
    own, other = row(module), row(name)
    if own is None:
        return [f"{module} is in no package of the list"]
    if other is None:
        return [f"{module} imports {name}, which is in no package of the list"]
    up = other > own
    if is_within(name, "jlora.ops.hopper") and not is_within(
        module, "jlora.ops.hopper"
    ):
        up |= is_within(module, "jlora.ops")
    if is_within(module, "jlora.data") and is_within(name, "jlora.data"):
        up |= station(name) > station(module)
    return [f"{module} imports {name}, which is above it"] if up else []


def station(module: str) -> int:
    part = (module.split(".") + [""] * 2)[2]
    return STATIONS.index(part) if part in STATIONS else len(STATIONS)


def circles(known: Sources) -> list[str]:
    """Returns every chain of imports that comes back to where it began."""
    graph = {
        module: sorted({name for name in imports(code, module, known) if name in known})
        for module, code in known.items()
        if module != "jlora"
    }
    done: set[str] = set()
    found: list[str] = []

    def visit(module: str, chain: list[str]) -> None:
        if module in chain:
            found.append(" -> ".join([*chain[chain.index(module) :], module]))
        elif module not in done:
            for name in graph.get(module, ()):
                visit(name, [*chain, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return found


def calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            pickled = any(keyword.arg == "allow_pickle" for keyword in node.keywords)
            yield ast.unparse(node.func) + (" with allow_pickle" if pickled else "")


def is_forbidden(call: str) -> bool:
    return call in FORBIDDEN_CALLS or call.endswith("allow_pickle")


@pytest.mark.parametrize("module", sources())
def test_imports_point_down_and_third_parties_have_one_owner(module):
    known = sources()
    assert violations(module, known[module], known) == []


def test_no_import_leads_back_to_where_it_began():
    assert circles(sources()) == []


def test_no_two_modules_share_a_name():
    names = [module.rpartition(".")[2] for module in sources()]
    packages = {module.split(".")[-2] for module in sources() if "." in module}
    twice = {name for name in names if names.count(name) > 1}
    assert twice - packages == set()


def test_every_package_says_what_it_holds():
    short = []
    for file in sorted((ROOT / "jlora").rglob("__init__.py")):
        text = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
        if not 3 <= len(text.splitlines()) <= 14:
            short.append(str(file.relative_to(ROOT)))
    assert short == []


@pytest.mark.parametrize(
    ("module", "code", "message"),
    [
        ("jlora.model.rotary", "from jlora.train.step import f", "above it"),
        ("jlora.model.rotary", "from jlora import train", "above it"),
        ("jlora.lora.merging", "def f():\n    import jlora.model.llama", "above it"),
        ("jlora.config.llama_config", "import jlora.cli.flags", "above it"),
        (
            "jlora.ops.attention",
            "from jlora.ops.hopper import lora_factors",
            "above it",
        ),
        ("jlora.data.read.jsonl", "import jlora.data.batch.packing", "above it"),
        ("jlora.utils", "from jlora.errors import JloraError", "in no package"),
        ("jlora.lora.merging", "from jlora.utils import f", "in no package"),
        ("jlora.train.step", "from convert.info import describe", "is a command"),
        ("convert.to_hf", "from train import main", "is a command"),
        ("convert.to_hf", "def f():\n    import convert.info", "is a command"),
        ("jlora.train.step", "import flax.linen as nn", "belongs to"),
        ("jlora.hub", "import orbax.checkpoint", "belongs to"),
        ("train", "import torch", "belongs to"),
        ("convert.info", "import pickle", "belongs to"),
        ("jlora.cli.command", "eval('1')", "calls eval"),
        ("convert.info", "np.load(f, allow_pickle=True)", "calls np.load"),
    ],
)
def test_a_violation_is_found(module, code, message):
    assert any(message in text for text in violations(module, code, sources()))


@pytest.mark.parametrize(
    "second",
    ["from jlora.lora.a import f", "def g():\n    from jlora.lora import a"],
)
def test_a_circle_is_found(second):
    known = {
        "jlora.lora.a": "import jlora.lora.b",
        "jlora.lora.b": second,
        "jlora.lora.c": "import jlora.lora.a",
    }
    assert circles(known) == ["jlora.lora.a -> jlora.lora.b -> jlora.lora.a"]


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("jlora.train.step", "from jlora.model.llama import Llama\nimport optax"),
        ("jlora.data.cache.corpus", "from jlora.data.read.records import read"),
        ("jlora.ops.hopper.lora_factors", "from jlora.ops.dropout import drop"),
        ("convert.to_hf", "from jlora import merge"),
        ("train", "import jlora\nfrom jlora.train.step import make_train_step"),
    ],
)
def test_an_import_of_a_lower_package_is_allowed(module, code):
    assert violations(module, code, sources()) == []
