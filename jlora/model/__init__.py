"""The Llama model.

Read `decoder_layer` first, then `llama`: embedding, layers, logits. `rotary` has the rotary
position embedding, `loss` the cross-entropy, `generation` makes text with what is in
`decoding`. `remat` holds what saves memory in the backward pass.
"""
