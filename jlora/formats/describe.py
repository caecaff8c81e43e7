"""What a model or an adapter is, as lines of text: one per fact."""

from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from jlora.config.llama_config import unused_keys
from jlora.config.rope_config import RopeParameters
from jlora.config.strict_json import MAX_JSON_BYTES, parse_json_object
from jlora.errors import listing
from jlora.formats.model_source import ModelSource
from jlora.formats.peft.adapter import Adapter

# tokenizer.json of a vocabulary of 256,000 takes about 20 MB.
MAX_TOKENIZER_BYTES = 256 << 20


def describe_model(source: ModelSource) -> list[str]:
    """Returns one line per fact of a model."""
    config = source.config
    head = "tied head" if config.tie_word_embeddings else "own head"
    biases = [
        name
        for name, there in (
            ("attention", config.attention_bias),
            ("MLP", config.mlp_bias),
        )
        if there
    ]
    stored = [
        spec
        for path in source.tensors
        for spec in source.specs(path, "keep", source.quantize).values()
    ]
    counts = Counter(str(spec.dtype) for spec in stored)
    facts = {
        "format": source.kind,
        "architecture": f"Llama, {config.num_hidden_layers} layers of "
        f"{config.hidden_size} (MLP {config.intermediate_size}), "
        f"{config.num_attention_heads} heads and {config.num_key_value_heads} kv heads "
        f"of {config.head_dim}, vocabulary {config.vocab_size:,}, {head}"
        + (f", biases in {' and '.join(biases)}" if biases else ""),
        "parameters": f"{sum(prod(s.shape) for s in source.tensors.values()):,}",
        "tensors": _counted(counts),
        "quantised": "no"
        if source.quantize == "none"
        else f"{source.quantize}: the layers' projections",
        "size": f"{sum(spec.nbytes for spec in stored):,} bytes",
        "rope": f"{_rope(config.rope_parameters)}, up to "
        f"{config.max_position_embeddings:,} positions"
        + (f", a window of {config.sliding_window:,}" if config.sliding_window else ""),
        "tokenizer": _tokenizer(source.files),
        "end tokens": listing(_end_tokens(source)) or "none",
        "chat template": _template(source.files),
    }
    unused = unused_keys(source.hf_config)
    if unused:
        facts["not used"] = listing(unused, 99)
    for key, value in source.provenance.items():
        name = "made from" if key == "format" else key.replace("_", " ")
        if isinstance(value, dict):
            value = listing([f"{k} {v}" for k, v in value.items()], 99)
        facts[name] = str(value)
    return _lines(facts)


def describe_adapter(
    adapter: Adapter,
    folder: Path,
    read_from: Path,
    steps: Sequence[int] = (),
    held: int | None = None,
) -> list[str]:
    """Returns one line per fact of a PEFT adapter folder or of a run.

    Args:
        adapter: what was read.
        folder: that of the adapter or run.
        read_from: what of it was read.
        steps: checkpoints of a run.
        held: the step of the run that `read_from` holds, if that is known.
    """
    config = adapter.config
    leaves = [leaf for module in adapter.tensors.values() for leaf in module.values()]
    kinds = Counter(path.rpartition("/")[2] for path in adapter.tensors)
    ranks = {
        module["lora_A"].shape[1]
        for module in adapter.tensors.values()
        if "lora_A" in module
    }
    scales = {f"{scale:g}" for scale in adapter.scalings.values()}
    form = "PEFT adapter" if read_from == folder else "run"
    facts = {
        "format": form,
        "adapter": f"{'DoRA' if config.use_dora else 'LoRA'}, rank "
        f"{_span(ranks)}, alpha {config.lora_alpha:g}, scale {' and '.join(sorted(scales))}"
        + (" (rank-stabilised)" if config.use_rslora else ""),
        "modules": _counted(kinds),
        "parameters": f"{sum(leaf.size for leaf in leaves):,}",
        "size": f"{sum(leaf.nbytes for leaf in leaves):,} bytes in memory",
        "base model": _base(adapter),
    }
    if form == "run":
        of_step = "" if held is None else f" (step {held})"
        facts["read from"] = read_from.relative_to(folder).as_posix() + of_step
        facts["checkpoints"] = listing(steps) or "none"
    return _lines(facts)


def _lines(facts: dict[str, str]) -> list[str]:
    width = max(map(len, facts)) + 2
    return [f"{name:<{width}}{fact}" for name, fact in facts.items()]


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} ({n})" for name, n in sorted(counts.items()))


def _span(ranks: set[int]) -> str:
    return f"{min(ranks)} to {max(ranks)}" if len(ranks) > 1 else listing(list(ranks))


def _base(adapter: Adapter) -> str:
    config = adapter.config
    name, revision = config.base_model_name_or_path, config.revision
    return f"{name or 'not named'}{f' at {revision}' if revision else ''}"


def _rope(rope: RopeParameters) -> str:
    text = f"{rope.rope_type}, theta {rope.rope_theta:,.0f}"
    if rope.rope_type != "default":
        text += f", factor {rope.factor:g}"
    if rope.original_max_position_embeddings:
        text += f" over {rope.original_max_position_embeddings:,}"
    if rope.attention_factor != 1:
        text += f", attention factor {rope.attention_factor:.6g}"
    return text


def _tokenizer(files: dict[str, bytes]) -> str:
    """Returns kind and size of the tokenizer, and the files it is in."""
    names = listing(sorted(files), 99) or "none"
    if "tokenizer.json" not in files:
        return names
    where = "tokenizer.json"
    document = parse_json_object(files[where], where, MAX_TOKENIZER_BYTES)
    model = document.get("model")
    if not isinstance(model, dict):
        return names
    vocabulary, added = model.get("vocab"), document.get("added_tokens")
    # A dictionary of tokens, or Unigram's list of [token, score].
    tokens = {
        item[0] if isinstance(item, list) and item else str(item)
        for item in vocabulary or ()
    } | {item.get("content") for item in added or () if isinstance(item, dict)}
    return f"{model.get('type') or 'BPE'}, {len(tokens):,} tokens; {names}"


def _end_tokens(source: ModelSource) -> list[int]:
    """Returns the ids that end a text, of config.json and of generation_config.json."""
    name = "generation_config.json"
    given: Any = None
    if name in source.files:
        given = parse_json_object(source.files[name], name).get("eos_token_id")
    more = given if isinstance(given, list) else [given]
    return sorted(
        {*source.config.eos_token_id, *(i for i in more if isinstance(i, int))}
    )


def _template(files: dict[str, bytes]) -> str:
    """Returns where the chat template is, and how long it is."""
    found = [name for name in sorted(files) if "chat_template" in name]
    name = "tokenizer_config.json"
    if name in files:
        config = parse_json_object(files[name], name, MAX_JSON_BYTES)
        template = config.get("chat_template")
        if isinstance(template, str):
            found.append(f"{name} ({len(template):,} characters)")
        elif template:
            found.append(f"{name} ({len(template)} templates)")
    return listing(found) or "none"
