import importlib.metadata
from dataclasses import dataclass, field
from typing import Any

import pytest

from jlora.cli import check_versions, parse, run_command
from jlora.config import LoraConfig
from jlora.errors import CorruptError, StopRequested, UsageError
from jlora.settings import OptimConfig


@dataclass(frozen=True)
class Arguments:
    """A command."""

    source: str
    """Where from."""
    model: str
    """Which model."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    plan: bool = False
    """Only plan."""


def read(*words: str) -> Arguments:
    return parse(Arguments, ["here", "--model", "m", *words], positional=("source",))


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--lora.r", "16"], "r", 16),
        (["--lora.lora_alpha", "1e-4"], "lora_alpha", 1e-4),
        (
            ["--lora.target_modules", "[q_proj,v_proj]"],
            "target_modules",
            ["q_proj", "v_proj"],
        ),
        (["--lora.target_modules", "all-linear"], "target_modules", "all-linear"),
        (["--lora.target_modules", r".*\.q_proj"], "target_modules", r".*\.q_proj"),
        (["--lora.use_rslora"], "use_rslora", True),
        (["--lora.use_rslora", "true"], "use_rslora", True),
        (["--lora.use_rslora", "false"], "use_rslora", False),
        (["--lora.rank_pattern", '{"q_proj": 4}'], "rank_pattern", {"q_proj": 4}),
    ],
)
def test_flags_become_fields(words, name, value):
    assert getattr(read(*words).lora, name) == value


def test_a_bare_switch_before_another_flag_is_true():
    assert read("--plan", "--lora.r", "4").plan


@pytest.mark.parametrize("first", [True, False])
def test_flags_beat_the_file_in_either_order(tmp_path, first):
    file = tmp_path / "c.yaml"
    file.write_text(
        "model: x\nlora:\n  r: 4\n  lora_alpha: 3\noptim.learning_rate: 1e-4\n"
    )
    config, flag = ["--config", str(file)], ["--lora.r", "9"]
    words = [*config, *flag] if first else [*flag, *config]
    found = parse(Arguments, ["here", *words], positional=("source",))
    assert (found.model, found.lora.r, found.lora.lora_alpha) == ("x", 9, 3)
    assert found.optim.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora.rr", "3"], "did you mean --lora.r"),
        (["--lora.r", "x"], "lora.r"),
        (["--lora.r", "0"], "r=0"),
        (["--lora.lora_alpha", "0"], "lora_alpha=0"),
        (["--lora.lora_dropout", "1.0"], "lora_dropout=1.0"),
        (["--optim.learning_rate", "nan"], "learning_rate"),
        (["surplus"], "surplus"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_usage_is_one_sentence(words, message):
    with pytest.raises(UsageError) as failure:
        read(*words)
    assert message in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('lora: {r: "8"}', "without quotes"),
        ("model: a\nmodel: b", "occurs twice"),
        ("modle: a", "did you mean"),
        ("model: &a x\nsource: *a", "anchors"),
        ("- a", "expected keys and values"),
        ("model: [", "not valid"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as failure:
        read("--config", str(file))
    assert "c.yaml" in str(failure.value)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UsageError("u"), 2),
        (CorruptError("c"), 4),
        (MemoryError(), 5),
        (OSError(28, "No space left on device"), 5),
        (StopRequested("s"), 75),
    ],
)
def test_a_failure_is_one_line_and_its_exit_status(capsys, error, status):
    def main(_: Any) -> None:
        raise error

    words = ["here", "--model", "m"]
    assert run_command(main, Arguments, positional=("source",), argv=words) == status
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("jax", "flax", "refused"),
    [
        ("0.11.1", "0.12.8", True),
        ("0.12.0", "0.12.8", True),
        ("0.11.0", "0.12.8", False),
        ("0.11.2", "0.12.10", False),
        ("0.12.0.1", "0.12.12", False),
    ],
)
def test_the_broken_pair_of_jax_and_flax_is_refused(monkeypatch, jax, flax, refused):
    versions = {"jax": jax, "flax": flax}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    if refused:
        with pytest.raises(
            UsageError, match=f"jax {jax} does not work with flax {flax}"
        ):
            check_versions()
    else:
        check_versions()
