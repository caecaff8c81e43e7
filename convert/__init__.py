"""Formats in and out: HF safetensors, GGUF, PEFT adapters, converted bases."""

from convert.source import load

__all__ = ["load"]
