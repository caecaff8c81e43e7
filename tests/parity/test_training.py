from typing import Any

import llamas
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer

import convert
from jlora.config.optim_config import OptimConfig
from jlora.config.run_config import MeshConfig
from jlora.formats.peft.adapter_reader import read_adapter
from jlora.formats.tensor_names import module_name, module_path
from jlora.lora.adapter_tree import modules
from jlora.parallel.sharding import make_mesh
from jlora.train.optimizer import make_optimizer, make_schedule
from jlora.train.step import TrainState, make_train_step

STEPS = 5
RATE = 1e-2
# Larger than Adam's default, which would take a full step in a direction that is noise
# where a gradient is: rows of float32 sums differ by 1e-8 between the two sides.
EPS = 1e-5


def random_batches():
    rng = np.random.default_rng(7)
    for step in range(STEPS):
        tokens = llamas.random_tokens(rows=8, length=24, seed=step)
        mask = (rng.random(tokens.shape) < 0.6).astype(np.float32)
        mask[:, -1] = 0
        yield tokens, mask


def train_with_torch(model, *, weight_decay, max_grad_norm, ratio):
    parameters = [p for p in model.parameters() if p.requires_grad]
    if ratio is None:
        optimizer = torch.optim.AdamW(
            parameters, lr=RATE, eps=EPS, weight_decay=weight_decay
        )
    else:
        optimizer = create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=RATE,
            loraplus_lr_ratio=ratio,
            loraplus_weight_decay=weight_decay,
            eps=EPS,
        )
    losses = []
    for tokens, mask in random_batches():
        # HF shifts the labels itself.
        labels = np.where(np.roll(mask, 1, axis=1) > 0, tokens, -100)
        inputs = torch.tensor(tokens, dtype=torch.long)
        loss = model(inputs, labels=torch.tensor(labels, dtype=torch.long)).loss
        optimizer.zero_grad()
        loss.backward()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_with_jax(base, adapter, *, weight_decay, max_grad_norm, ratio, accumulate):
    model, params = convert.load(base, adapter=adapter)
    config = OptimConfig(
        learning_rate=RATE,
        lr_schedule="constant",
        warmup_ratio=0,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        loraplus_lr_ratio=ratio,
        adam_eps=EPS,
    )
    optimizer = make_optimizer(config, make_schedule(config, STEPS))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    state, frozen = TrainState.create(params, optimizer, mesh)
    step = make_train_step(
        model,
        optimizer,
        mesh,
        state=state,
        frozen=frozen,
        packed=False,
        grad_accum_steps=accumulate,
    )
    losses = []
    for tokens, mask in random_batches():
        batch = {
            "tokens": tokens,
            "targets": np.roll(tokens, -1, axis=1),
            "loss_mask": mask,
            "segment_ids": np.ones_like(tokens),
            "positions": np.arange(tokens.shape[1], dtype=np.int32) + 0 * tokens,
        }
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    return losses, state.trainable


METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "tables": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [5, 3]},
}


@pytest.mark.parametrize(
    ("method", "weight_decay", "max_grad_norm", "ratio", "accumulate"),
    [
        ("plain", 0.0, 0.0, None, 1),
        ("plain", 0.1, 0.05, None, 1),
        ("plain", 0.1, 0.05, None, 2),
        ("plain", 0.1, 0.05, 4.0, 1),
        ("rslora", 0.0, 0.0, None, 1),
        ("dora", 0.0, 0.0, None, 1),
        ("dora", 0.0, 0.05, None, 2),
        ("modules_to_save", 0.0, 0.0, None, 1),
        ("tables", 0.0, 0.0, None, 1),
        ("tokens", 0.0, 0.0, None, 1),
    ],
)
def test_five_steps_equal_torch_and_peft(
    method, weight_decay, max_grad_norm, ratio, accumulate, tmp_path
):
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 8}
    fields |= {"target_modules": ["q_proj", "v_proj"]}
    config = LoraConfig(**(fields | METHODS[method]), task_type="CAUSAL_LM")
    torch.manual_seed(5)
    theirs = get_peft_model(llamas.save(tmp_path / "base"), config)
    theirs.save_pretrained(adapter)
    options = {
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "ratio": ratio,
    }
    expected = train_with_torch(theirs, **options)
    losses, trainable = train_with_jax(base, adapter, accumulate=accumulate, **options)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-4)
    # Read as files are, so that the names and layouts of both sides agree.
    theirs.save_pretrained(tmp_path / "trained")
    trained = read_adapter(tmp_path / "trained")
    assert modules(trainable).keys() == {module_name(p) for p in trained.tensors}
    for name, leaves in modules(trainable).items():
        for leaf, array in leaves.items():
            other = trained.tensors[module_path(name)][leaf]
            np.testing.assert_allclose(
                array, other, rtol=0, atol=1e-4, err_msg=f"{name} {leaf}"
            )
