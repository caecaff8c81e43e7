"""LoRA: leaves beside the weights of a model, and all that is done with them.

Read in this order: `adapter_tree` (which leaves there are, and functions on trees that
have them), `target_modules` (which modules get an adapter) with `name_matching`,
`initialisation` (`add_lora`), `lora_dense` (the layer that uses the leaves), `projections`
(several such layers, fused where possible), `embedding_and_head` and `merging` (`merge`).
"""
