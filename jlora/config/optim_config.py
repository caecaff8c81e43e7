"""The flags of the optimizer."""

from dataclasses import dataclass, field
from typing import Literal

from jlora.config.field_types import check_at_least
from jlora.config.json_fields import MAX_FLOAT
from jlora.errors import UsageError, listing, nearest

# Groups of trained parameters, see `optimizer.group_of`. `embedding`: the LoRA factors of
# the embedding; `whole`: matrices that are trained in full; `norm`: scales and biases.
DECAY_GROUPS: tuple[str, ...] = (
    *("lora_A", "lora_B", "embedding", "magnitude", "whole", "norm"),
)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer: AdamW on the adapter."""

    learning_rate: float = 2e-4
    """Peak learning rate."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the decay after warm-up; linear and cosine end at 0."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises linearly to its peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay of all trained parameters except norms and biases."""
    group_weight_decay: dict[str, float] = field(default_factory=dict)
    """Weight decay by group: lora_A, lora_B, embedding, magnitude, whole, norm."""
    loraplus_lr_ratio: float | None = None
    """LoRA+: learning rate of lora_B as a multiple of lora_A's; null: the same."""
    loraplus_lr_embedding: float = 1e-6
    """LoRA+: learning rate of the adapter on the embedding."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 turns clipping off."""
    adam_b1: float = 0.9
    """Decay of the first moment."""
    adam_b2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the denominator of the update."""

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range."""
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            check_at_least("optim", self, name, 0)
        if not 1e-30 < self.adam_eps < MAX_FLOAT:
            raise UsageError(
                f"optim.adam_eps={self.adam_eps}; expected a number above 0, from 1e-30: AdamW "
                "divides by it where a gradient is 0"
            )
        for name in ("warmup_ratio", "adam_b1", "adam_b2"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (name != "warmup_ratio" and value == 1):
                raise UsageError(f"optim.{name}={value}; expected a number in [0, 1)")
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
