"""Settings of sampling that are compared with Transformers' processors."""

import jax
import jax.numpy as jnp
import numpy as np

from jlora.config.sampling_config import SamplingConfig
from jlora.model.decoding.sampling import Settings, process

CASES = {
    "penalty": SamplingConfig(repetition_penalty=1.3),
    "temperature": SamplingConfig(temperature=0.7),
    "top_k": SamplingConfig(temperature=1.0, top_k=7),
    "top_k_above_all": SamplingConfig(temperature=2.0, top_k=1000),
    "top_p": SamplingConfig(temperature=1.0, top_p=0.9),
    "top_p_of_one_token": SamplingConfig(temperature=0.5, top_p=1e-6),
    "min_p": SamplingConfig(temperature=1.5, min_p=0.05),
    "all": SamplingConfig(
        temperature=1.2, top_k=40, top_p=0.8, min_p=0.02, repetition_penalty=0.8
    ),
}


def logits_and_texts() -> tuple[np.ndarray, np.ndarray]:
    """Float32 logits [B, V], and for each row ten ids that have occurred."""
    random = np.random.default_rng(0)
    logits = 4 * random.normal(size=(5, 300))
    return logits.astype(np.float32), random.integers(0, 300, (5, 10))


def occurred(texts, size):
    seen = np.zeros((len(texts), size), bool)
    seen[np.arange(len(texts))[:, None], texts] = True
    return jnp.asarray(seen)


def probabilities(logits, texts, case):
    """The probabilities after each step of a case, which all rows have."""
    settings = Settings.of([case] * len(logits))
    seen = occurred(texts, logits.shape[1])
    steps = process(jnp.asarray(logits), settings, seen, case.steps)
    return {name: np.asarray(jax.nn.softmax(scores, -1)) for name, scores in steps}
