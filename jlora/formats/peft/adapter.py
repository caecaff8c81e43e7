"""An adapter as a value: its tensors in jlora's layout, its settings, where it belongs."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jlora.config.lora_config import LoraConfig
from jlora.errors import CorruptError, UsageError, listing
from jlora.formats.tensor_names import module_name, module_path
from jlora.lora.target_modules import select_modules

Tensors = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter in jlora's layout."""

    config: LoraConfig
    tensors: Tensors
    """Params path of a module -> leaves as in the tree (see `jlora.lora.lora_dense`), float32.

    `lora_A` [in, R] and `lora_B` [R, out]; `lora_magnitude`, `token_rows`, `trained_*`;
    and, as stored, `kernel` or `embedding`, a table that replaces the base's.
    """
    scalings: dict[str, float]
    """Params path of a module with a pair -> alpha / R, or alpha / sqrt(R)."""
    location: Path
    """What it was read from, for messages; never written."""
    resized: bool = False
    """Whether its tables are its own, as the vocabulary was resized, not the base's."""

    @classmethod
    def make(
        cls,
        config: LoraConfig,
        tensors: Tensors,
        location: Path,
        resized: bool = False,
    ) -> "Adapter":
        """Returns the adapter of these tensors, with scalings as the settings say.

        Raises:
            CorruptError: the settings give a module another rank than its tensors have.
        """
        ranks = {
            module_name(path): leaves["lora_A"].shape[1]
            for path, leaves in tensors.items()
            if "lora_A" in leaves
        }
        every_module = replace(
            config,
            target_modules=list(ranks),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            modules_to_save=None,
        )
        try:
            selected = select_modules(every_module, list(ranks), strict=False)
        except UsageError as error:
            raise CorruptError(f"{location}: {error}") from error
        wrong = [
            f"{name} has rank {ranks[name]}, the settings say {rank}"
            for name, (rank, _) in selected.items()
            if ranks[name] != rank
        ]
        if wrong:
            raise CorruptError(
                f"{location}: r or rank_pattern disagree with the tensors: "
                f"{listing(wrong)}"
            )
        scalings = {module_path(name): s for name, (_, s) in selected.items()}
        return cls(config, tensors, scalings, location, resized)

    @property
    def pairs(self) -> Tensors:
        """The modules that have lora_A and lora_B."""
        return {path: x for path, x in self.tensors.items() if "lora_A" in x}

    @property
    def vocab_size(self) -> int | None:
        """Rows of the tables that it brings or trains, if any."""
        table = self.tensors.get("embed_tokens", {})
        kernel = self.tensors.get("lm_head", {})
        rows = [
            table[x].shape[0] for x in ("embedding", "trained_embedding") if x in table
        ]
        rows += [
            kernel[x].shape[1] for x in ("kernel", "trained_kernel") if x in kernel
        ]
        return max(rows, default=None)

    @property
    def takes_start_out(self) -> bool:
        """Whether its tensors belong to a base less the adapter's start (PiSSA, OLoRA)."""
        return takes_start_out(self.config)


def takes_start_out(config: LoraConfig) -> bool:
    """Returns whether training with these settings takes the start out of the base."""
    return str(config.init_lora_weights).startswith(("pissa", "olora"))


def without_starts(adapter: Adapter, starts: Tensors) -> Adapter:
    """Returns a plain LoRA adapter of twice the rank for the whole base.

    A' = [A, A0] and B' = [B, -B0], so that A' B' = A B - A0 B0. A pair without a start
    (the embedding's) is padded with zeros.

    Args:
        adapter: whose tensors are the trained ones.
        starts: params path -> lora_A0 and lora_B0.
    """
    tensors: Tensors = {}
    for path, leaves in adapter.tensors.items():
        tensors[path] = dict(leaves)
        if "lora_A" not in leaves:
            continue
        a, b = leaves["lora_A"], leaves["lora_B"]
        start = starts.get(path, {"lora_A0": 0 * a, "lora_B0": 0 * b})
        tensors[path]["lora_A"] = np.concatenate([a, start["lora_A0"]], axis=1)
        tensors[path]["lora_B"] = np.concatenate([b, -start["lora_B0"]], axis=0)
    config = adapter.config
    alpha = 2**0.5 if config.use_rslora else 2
    doubled = replace(
        config,
        r=2 * config.r,
        lora_alpha=alpha * config.lora_alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: alpha * x for key, x in config.alpha_pattern.items()},
        init_lora_weights=True,
    )
    return Adapter.make(doubled, tensors, adapter.location, adapter.resized)
