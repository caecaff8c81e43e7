"""Chat templates, rendered as Transformers renders them.

`chat_template` is the entry. `jinja_sandbox` and `template_budget` keep a template from
reaching Python or running for ever. `control_tokens` keeps `<|im_end|>` in a message
plain text.
"""
