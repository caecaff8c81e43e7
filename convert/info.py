"""Prints what a model is: architecture, sizes, dtypes, rope, tokenizer, origin."""

from collections import Counter
from dataclasses import dataclass
from math import prod

from convert.source import Source, open_source
from jlora.cli import run_command
from jlora.strict_json import parse_json_object


@dataclass(frozen=True)
class Arguments:
    """Show what a converted base, HF folder, hub id or .gguf file holds."""

    path: str
    """Converted base, HF folder, hub id (owner/name) or .gguf file."""


def main(arguments: Arguments) -> None:
    """Prints one line per fact."""
    print("\n".join(describe(open_source(arguments.path))))


def describe(source: Source) -> list[str]:
    """Returns one line per fact; weights are not read."""
    config, rope = source.config, source.config.rope_parameters
    head = "tied head" if config.tie_word_embeddings else "own head"
    counts = Counter(str(spec.dtype) for spec in source.tensors.values())
    dtypes = ", ".join(f"{dtype} ({n})" for dtype, n in sorted(counts.items()))
    scaling = (
        f", factor {rope.factor:g} over {rope.original_max_position_embeddings:,}"
        if rope.rope_type != "default"
        else ""
    )
    facts = {
        "format": source.kind,
        "architecture": f"Llama, {config.num_hidden_layers} layers of "
        f"{config.hidden_size} (MLP {config.intermediate_size}), "
        f"{config.num_attention_heads} heads and {config.num_key_value_heads} kv heads "
        f"of {config.head_dim}, vocabulary {config.vocab_size:,}, {head}",
        "parameters": f"{sum(prod(s.shape) for s in source.tensors.values()):,}",
        "tensors": dtypes,
        "size": f"{sum(spec.nbytes for spec in source.tensors.values()):,} bytes",
        "rope": f"{rope.rope_type}, theta {rope.rope_theta:,.0f}{scaling}, up to "
        f"{config.max_position_embeddings:,} positions",
        "tokenizer": ", ".join(sorted(source.files)) or "none",
        "chat template": "yes" if _has_template(source.files) else "no",
    }
    for key, value in source.provenance.items():
        facts["made from" if key == "format" else key.replace("_", " ")] = str(value)
    width = max(map(len, facts)) + 2
    return [f"{name:<{width}}{fact}" for name, fact in facts.items()]


def _has_template(files: dict[str, bytes]) -> bool:
    if any(name.startswith("chat_template.") for name in files):
        return True
    name = "tokenizer_config.json"
    return name in files and bool(
        parse_json_object(files[name], name).get("chat_template")
    )


if __name__ == "__main__":
    raise SystemExit(run_command(main, Arguments, positional=("path",)))
