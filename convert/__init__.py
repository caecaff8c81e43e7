"""Formats in and out: HF safetensors, GGUF, PEFT adapters, converted bases."""

from jlora.formats.load_params import load

__all__ = ["load"]
