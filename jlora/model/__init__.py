"""The Llama model.

Read `decoder_layer` first, then `llama`: embedding, layers, logits. `rotary` has the rotary
position embedding, `loss` the cross-entropy, `kv_cache` and `generation` make text. `remat`
holds what saves memory in the backward pass.
"""
