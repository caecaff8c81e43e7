import jax
import llamas
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer

import convert
from jlora.optimizer import make_optimizer, make_schedule
from jlora.settings import MeshConfig, OptimConfig
from jlora.sharding import make_mesh
from jlora.training import TrainState, make_train_step

STEPS = 5
RATE = 1e-2


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
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=weight_decay)
    else:
        optimizer = create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=RATE,
            loraplus_lr_ratio=ratio,
            loraplus_weight_decay=weight_decay,
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


@pytest.mark.parametrize(
    ("weight_decay", "max_grad_norm", "ratio", "accumulate"),
    [
        (0.0, 0.0, None, 1),
        (0.1, 0.05, None, 1),
        (0.1, 0.05, None, 2),
        (0.1, 0.05, 4.0, 1),
    ],
)
def test_five_steps_equal_torch_and_peft(
    weight_decay, max_grad_norm, ratio, accumulate, tmp_path
):
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
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
    ours = {
        ".".join(entry.key for entry in path): np.asarray(leaf).T
        for path, leaf in jax.tree_util.tree_leaves_with_path(trainable)
    }
    adapters = {
        name.removeprefix("base_model.model.model.").removesuffix(".default.weight"): p
        for name, p in theirs.named_parameters()
        if "lora_" in name
    }
    assert ours.keys() == adapters.keys()
    for name, parameter in adapters.items():
        np.testing.assert_allclose(
            ours[name], parameter.detach().numpy(), rtol=0, atol=1e-4, err_msg=name
        )
