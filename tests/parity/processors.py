"""What Transformers' logits processors make of logits."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import logits_process

from jlora.config.sampling_config import SamplingConfig

NAMES = {
    logits_process.RepetitionPenaltyLogitsProcessor: "repetition_penalty",
    logits_process.TemperatureLogitsWarper: "temperature",
    logits_process.TopKLogitsWarper: "top_k",
    logits_process.TopPLogitsWarper: "top_p",
    logits_process.MinPLogitsWarper: "min_p",
}


def probabilities_of_transformers(
    logits: np.ndarray, texts: np.ndarray, case: SamplingConfig
) -> dict[str, np.ndarray]:
    """Returns the probabilities after every processor that `generate` would use, in order."""
    tiny = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(tiny)
    settings = model.generation_config
    settings.update(
        do_sample=case.temperature > 0,
        temperature=case.temperature or None,
        top_k=case.top_k,
        top_p=case.top_p,
        min_p=case.min_p or None,
        repetition_penalty=case.repetition_penalty,
    )
    processors = model._get_logits_processor(
        settings, input_ids_seq_length=10, device="cpu", logits_processor=None
    )
    scores, found = torch.from_numpy(logits.copy()), {}
    for processor in processors:
        scores = processor(torch.from_numpy(texts), scores)
        found[NAMES[type(processor)]] = torch.softmax(scores, -1).numpy()
    return found
