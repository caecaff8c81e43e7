"""How remat full and offload keep little in memory: not needed to understand the model.

`layer_memory` orders the gradients of layers and cuts an MLP into pieces; `offload` keeps
the inputs of layers in the host's memory. `layer_runs` stacks layers for loops over them.
"""
