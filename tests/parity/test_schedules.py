"""Learning rates of every schedule, beside those of Transformers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from jlora.config.optim_config import OptimConfig
from jlora.train.optimizer import make_schedule

# jlora's name: theirs, and how they call what jlora computes from min_lr_ratio and so on.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "constant": ("constant_with_warmup", {}),
    "linear": ("linear", {}),
    "cosine": ("cosine", {}),
    "cosine to a minimum": ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    "inverse_sqrt": ("inverse_sqrt", {}),
    "wsd": ("warmup_stable_decay", {"min_lr_ratio": 0.0}),
    "wsd to a minimum": ("warmup_stable_decay", {"min_lr_ratio": 0.25}),
}


def theirs(name: str, warmup: int, steps: int, settings: dict[str, Any]) -> np.ndarray:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3e-4)
    scheduler = get_scheduler(
        name, optimizer, warmup, steps, scheduler_specific_kwargs=settings
    )
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


@pytest.mark.parametrize(("steps", "warmup"), [(7, 0), (10, 3), (100, 3), (1000, 100)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_equals_that_of_transformers(kind, steps, warmup):
    name, settings = KINDS[kind]
    ours = kind.partition(" ")[0]
    ratio = settings.get("min_lr_rate", settings.get("min_lr_ratio", 0.0))
    config = OptimConfig(
        learning_rate=3e-4,
        lr_schedule=ours,  # type: ignore[arg-type]
        warmup_ratio=0,
        warmup_steps=warmup,
        min_lr_ratio=ratio,
    )
    if ours == "wsd":
        settings = settings | {"num_decay_steps": math.ceil(0.1 * steps)}
    found = np.asarray(make_schedule(config, steps)(np.arange(steps)))
    expected = theirs(name, warmup, steps, settings)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=3e-4 * 1e-6)
