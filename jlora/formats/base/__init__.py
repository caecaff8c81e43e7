"""Converted bases: a model in jlora's own layout, with a checksum of all that is stored.

A base holds `params/<part>.safetensors` (kernels as [in, out], under our params paths),
config.json, tokenizer and template files, and jlora.json. Read `base_record` first, which
describes jlora.json, then `base_writer` and `base_reader`.
"""
