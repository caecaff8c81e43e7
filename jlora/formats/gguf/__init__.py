"""llama.cpp's GGUF files.

Read `gguf_model` first, which opens one. `gguf_file` parses the container, `gguf_layout`
names the tensors, `gguf_config` and `gguf_tokenizer` turn the metadata into the files of a
Hugging Face folder. `gguf_metadata` and `gguf_vocabulary` go the other way for
`jlora.formats.export_gguf`, and `modelfile` writes Ollama's.
"""
