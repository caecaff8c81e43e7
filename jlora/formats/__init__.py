"""Reads and writes model files.

Read `open_model` first: it opens any path and returns a `ModelSource` (`model_source`),
whose tensors `load_params` reads straight to the devices. The formats are `hf`, `gguf`
and `base` (models) and `peft` (adapters). They share `tensor_names` (one table of names),
`safetensors_file` and `array_blocks` (reading in blocks), `refusals` and `tensor_checks`
(what is refused, and why), and `atomic_folder` (folders that appear whole).
"""
