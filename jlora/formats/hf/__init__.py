"""Hugging Face model folders.

Read `hf_folder` first, which opens one; `hf_index` finds its tensors in one file or many.
The remaining module makes the config.json of an exported model.
"""
