"""Hugging Face model folders.

Read `hf_folder` first, which opens one; `hf_index` finds its tensors in one file or many.
Weights that other tools quantised are read by `bitsandbytes_nf4` and `fp8_scaled`. The
remaining module makes the config.json of an exported model.
"""
