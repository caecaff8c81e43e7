"""PEFT adapters, in and out. What PEFT lets pass with a warning is refused here.

Read `adapter.py` first: an `Adapter` is its settings and tensors, whose ranks agree. Then
`adapter_keys.py` and `adapter_config.py` for PEFT's two files, `adapter_reader.py` and
`adapter_writer.py`. `attach_adapter.py` puts an adapter's leaves into a model's parameters;
`adapter_placement.py` and `adapter_embeddings.py` decide which leaves, and check that they
fit. `named_base.py` opens the base that an adapter names. The others change an adapter:
`plain_lora.py` (PiSSA and OLoRA), `combine_adapters.py` and `serving_formats.py` (vLLM and
llama.cpp). Source: PEFT 0.21 and its files back to 0.4.
"""
