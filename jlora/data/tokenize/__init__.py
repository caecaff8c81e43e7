"""From records to token ids and loss masks.

`tokenizer` (with `tokenizer_settings`) is the model's tokenizer, `tokenize_rows` the entry.
For conversations, `assistant_masks` finds the tokens to train on, and `prefix_ids` saves
it from encoding the same text several times.
"""
