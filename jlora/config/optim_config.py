"""The flags of the optimizer."""

from dataclasses import dataclass, field
from typing import Any, Literal

from jlora.config.field_types import check_at_least, replaces
from jlora.config.json_fields import MAX_FLOAT
from jlora.errors import UsageError, listing, nearest

# Groups of trained parameters, see `optimizer.group_of`. `embedding`: the LoRA factors of
# the embedding; `whole`: matrices that are trained in full; `norm`: scales and biases.
DECAY_GROUPS: tuple[str, ...] = (
    *("lora_A", "lora_B", "embedding", "magnitude", "whole", "norm"),
)

# Settings that only some schedules or optimizers have.
_WITH_ADAM = ("optimizer", ("adamw", "adamw_8bit", "muon"))
_USERS = {
    "min_lr_ratio": ("lr_schedule", ("cosine", "wsd")),
    "decay_ratio": ("lr_schedule", ("wsd",)),
    **dict.fromkeys(("adam_b1", "adam_b2", "adam_eps"), _WITH_ADAM),
}


def _replaces_unused(field_name: str) -> dict[str, Any]:
    """Returns the metadata of a choice that drops the settings of other choices."""
    return {
        "replaces": lambda value: [
            name
            for name, (choice, users) in _USERS.items()
            if choice == field_name and value not in users
        ]
    }


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer of the adapter, and its learning rate."""

    optimizer: Literal["adamw", "adamw_8bit", "lion", "muon", "adafactor"] = field(
        default="adamw", metadata=_replaces_unused("optimizer")
    )
    """Rule of the updates; adamw_8bit: moments in a quarter of the memory; muon: of lora_A and
    lora_B, AdamW of what else is trained."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    lr_schedule: Literal["linear", "cosine", "constant", "wsd", "inverse_sqrt"] = field(
        default="linear", metadata=_replaces_unused("lr_schedule")
    )
    """Shape after warm-up, as in Transformers; wsd: constant, then a cosine at the end."""
    warmup_ratio: float = field(default=0.03, metadata=replaces("warmup_steps"))
    """Share of the steps in which the learning rate rises linearly from 0 to its peak."""
    warmup_steps: int = field(default=0, metadata=replaces("warmup_ratio", when=bool))
    """Number of these steps, at most all but the last; 0: warmup_ratio decides."""
    min_lr_ratio: float = 0.0
    """Of cosine and wsd: rate at the end, as a share of the peak."""
    decay_ratio: float = 0.1
    """Of wsd: share of the steps in which the rate falls, at the end."""
    weight_decay: float = 0.0
    """Decoupled weight decay of all trained parameters except norms and biases."""
    group_weight_decay: dict[str, float] = field(default_factory=dict)
    """Weight decay by group: lora_A, lora_B, embedding, magnitude, whole, norm."""
    loraplus_lr_ratio: float | None = field(
        default=None,
        metadata=replaces("loraplus_lr_embedding", when=lambda ratio: ratio is None),
    )
    """LoRA+: learning rate of lora_B as a multiple of lora_A's; null: the same."""
    loraplus_lr_embedding: float = 1e-6
    """LoRA+: learning rate of the adapter on the embedding."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 turns clipping off."""
    adam_b1: float = 0.9
    """AdamW: decay of the first moment."""
    adam_b2: float = 0.999
    """AdamW: decay of the second moment."""
    adam_eps: float = 1e-8
    """AdamW: added to the denominator of the update."""

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range."""
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            check_at_least("optim", self, name, 0)
        if not 1e-30 < self.adam_eps < MAX_FLOAT:
            raise UsageError(
                f"optim.adam_eps={self.adam_eps}; expected a number above 0, from 1e-30: AdamW "
                "divides by it where a gradient is 0"
            )
        check_at_least("optim", self, "warmup_steps", 0)
        for name in ("warmup_ratio", "min_lr_ratio", "decay_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                value = getattr(self, name)
                raise UsageError(f"optim.{name}={value}; expected a number in [0, 1]")
        if self.warmup_steps and self.warmup_ratio not in (0, OptimConfig.warmup_ratio):
            raise UsageError(
                f"optim.warmup_ratio={self.warmup_ratio} has no effect with "
                f"optim.warmup_steps={self.warmup_steps}; leave one of them out"
            )
        for name in ("adam_b1", "adam_b2"):
            if not 0 <= getattr(self, name) < 1:
                value = getattr(self, name)
                raise UsageError(f"optim.{name}={value}; expected a number in [0, 1)")
        for name, (choice, users) in _USERS.items():
            is_given = getattr(self, name) != getattr(OptimConfig, name)
            if is_given and getattr(self, choice) not in users:
                raise UsageError(
                    f"optim.{name} has no effect with optim.{choice}="
                    f"{getattr(self, choice)}; it is for {listing(users)}"
                )
        for group, decay in self.group_weight_decay.items():
            if group not in DECAY_GROUPS:
                raise UsageError(
                    f"optim.group_weight_decay: no group {group!r}"
                    f"{nearest(group, DECAY_GROUPS)}; there are {listing(DECAY_GROUPS)}"
                )
            if not 0 <= decay <= MAX_FLOAT:
                raise UsageError(
                    f"optim.group_weight_decay: {group}={decay!r}; expected at least 0"
                )
        embedding_rate = OptimConfig.loraplus_lr_embedding
        if self.loraplus_lr_ratio is None:
            if self.loraplus_lr_embedding != embedding_rate:
                raise UsageError(
                    "optim.loraplus_lr_embedding has no effect without "
                    "optim.loraplus_lr_ratio, which turns LoRA+ on"
                )
        else:
            check_at_least("optim", self, "loraplus_lr_ratio", 0)
            check_at_least("optim", self, "loraplus_lr_embedding", 0)
            if not self.learning_rate:
                raise UsageError(
                    "optim.loraplus_lr_ratio needs optim.learning_rate above 0"
                )
