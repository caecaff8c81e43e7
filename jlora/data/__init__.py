"""From files of records to batches of token ids. Read the packages in this order.

`read` finds the files and turns their rows into records; `chat` renders a conversation
with the model's chat template, in a sandbox; `tokenize` encodes records and marks the
tokens that the loss counts; `cache` keeps token ids on disk; `batch` packs them into
rows and makes the batch of any step.

Nothing here imports JAX: worker processes that tokenise start a second sooner.
"""
