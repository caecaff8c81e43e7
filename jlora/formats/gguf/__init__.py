"""llama.cpp's GGUF files, read only.

Read `gguf_model` first, which opens one. `gguf_file` parses the container, `gguf_config`
and `gguf_tokenizer` turn its metadata into the files of a Hugging Face folder.
"""
