"""What makes text: many steps of the model in one compiled call.

Read `engine` first: prompt, then steps by the chunk, and `token_rows`, which ends rows.
`decoding_weights` merges adapters. `kv_cache` keeps what is not computed
again, `sampling` chooses a token, `text_stream` makes text of tokens as they come.
"""
