"""Llama with LoRA in pure JAX: exact, fast, and small enough to read in an afternoon."""

from jlora.config import LlamaConfig, LoraConfig
from jlora.lora import LoRADense, count_parameters, trainable_mask
from jlora.lora_init import add_lora
from jlora.merge import merge
from jlora.model import Llama

__all__ = [
    "Llama",
    "LlamaConfig",
    "LoRADense",
    "LoraConfig",
    "add_lora",
    "count_parameters",
    "merge",
    "trainable_mask",
]
