"""Settings: what a model, an adapter and a run are, checked when they are made.

`llama_config` (a config.json of Hugging Face's) uses `rope_config` for its rotary settings
and `architectures` to refuse what is not a Llama. `lora_config` has PEFT's settings,
`run_config` the flag groups of a run: its attributes' docstrings are the help of the flags.
`strict_json`, `json_fields` and `field_types` are the checks that they share.
"""
