"""Chat templates, rendered as Transformers renders them.

`chat_template` is the entry. It runs `jinja_sandbox` in a process with limits, so that a
template neither reaches Python nor runs for ever. `control_tokens` keeps `<|im_end|>` in a
message plain text, and `turn_markers` finds which tokens those are.
"""
