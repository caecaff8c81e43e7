"""The Llama model.

Read `llama` first (layers, attention with a key-value cache, the logits), then `rotary`,
`loss` and `generation`. `offload` keeps saved activations in host memory.
"""
