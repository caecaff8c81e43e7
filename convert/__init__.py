"""Formats in and out: HF safetensors, GGUF, PEFT adapters, converted bases."""

from convert.loading import load

__all__ = ["load"]
