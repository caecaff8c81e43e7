"""An adapter as a value: its settings and its tensors, in jlora's layout."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jlora.config.lora_config import LoraConfig
from jlora.errors import CorruptError, UsageError, listing
from jlora.formats.peft.adapter_keys import EMBED_PATH
from jlora.formats.tensor_names import module_name, module_path
from jlora.lora.adapter_tree import HEAD
from jlora.lora.target_modules import select_targets

Tensors = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter; `Adapter.make` checks its ranks and computes its scalings."""

    config: LoraConfig
    tensors: Tensors
    """Params path of a module -> its leaves, named and laid out as in `jlora.lora.adapter_tree`.

    All are float32, except an `embedding` or `kernel` that replaces the base's: that has
    the dtype of the file.
    """
    scalings: dict[str, float]
    """Params path of each module with lora_A and lora_B -> what A B is multiplied by."""
    location: Path
    """Where it was read from, for messages only."""
    has_own_embeddings: bool = False
    """Whether its untrained whole embeddings belong to it, as of a resized vocabulary.

    If not, they are copies of its base's, which PEFT saves beside an adapted or trained
    embedding; these are not written again.
    """

    @classmethod
    def make(
        cls,
        config: LoraConfig,
        tensors: Tensors,
        location: Path,
        has_own_embeddings: bool = False,
    ) -> "Adapter":
        """Returns the adapter of these settings and tensors.

        Raises:
            CorruptError: the settings give a module another rank than its tensors have.
        """
        ranks = {
            module_name(path): leaves["lora_A"].shape[1]
            for path, leaves in tensors.items()
            if "lora_A" in leaves
        }
        # The tensors say which modules are adapted; the settings, their rank and scaling.
        without_selection = replace(
            config,
            target_modules=list(ranks),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            modules_to_save=None,
        )
        try:
            selected = select_targets(without_selection, list(ranks), strict=False)
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
        return cls(config, tensors, scalings, location, has_own_embeddings)

    @property
    def pairs(self) -> Tensors:
        """The modules that have lora_A and lora_B."""
        return {path: x for path, x in self.tensors.items() if "lora_A" in x}

    @property
    def vocab_size(self) -> int | None:
        """Number of tokens of the embeddings it contains; None if it contains none."""
        rows = [
            array.shape[axis]
            for path, weight, axis in (
                (EMBED_PATH, "embedding", 0),
                (HEAD, "kernel", 1),
            )
            for leaf, array in self.tensors.get(path, {}).items()
            if leaf in (weight, f"trained_{weight}")
        ]
        return max(rows, default=None)


def padded_pair(
    lora_a: np.ndarray, lora_b: np.ndarray, rank: int
) -> dict[str, np.ndarray]:
    """Returns lora_A and lora_B, padded with zeros to a larger rank."""
    extra = rank - lora_a.shape[1]
    return {
        "lora_A": np.pad(lora_a, ((0, 0), (0, extra))),
        "lora_B": np.pad(lora_b, ((0, extra), (0, 0))),
    }
