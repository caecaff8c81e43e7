import llamas
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import convert
from convert import to_hf
from jlora.formats.peft.adapter_writer import write_adapter_folder
from jlora.formats.peft.combine_adapters import combine_adapters
from jlora.loading import open_adapter

EVERY = [f"{p}_proj" for p in ("q", "k", "v", "o", "gate", "up", "down")]
SETTINGS = [
    {"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]},
    {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": EVERY},
    {"r": 6, "lora_alpha": 3, "target_modules": ["v_proj", "down_proj"]},
]
WEIGHTS = [0.75, -1.5, 2.0]


def make(tmp_path, count, dtype=torch.float32):
    """Writes a base and adapters; returns PEFT's model with all of them."""
    llamas.save(tmp_path / "base", dtype=dtype)
    folders = [tmp_path / f"adapter{i}" for i in range(count)]
    for index, (folder, settings) in enumerate(zip(folders, SETTINGS, strict=False)):
        torch.manual_seed(index)
        config = LoraConfig(task_type="CAUSAL_LM", **settings)
        theirs = get_peft_model(llamas.load(tmp_path / "base", dtype), config)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "lora_" in name:  # on a grid, every sum of products is exact
                    parameter.copy_(torch.randint(-16, 17, parameter.shape) / 64)
        theirs.save_pretrained(folder)
    model = PeftModel.from_pretrained(
        llamas.load(tmp_path / "base", dtype), folders[0], adapter_name="0"
    )
    for index, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=str(index))
    return model.eval(), list(map(str, folders))


def updates(model, name):
    """Returns {module: B A * scaling} of one of PEFT's adapters."""
    found = {}
    for key, module in model.named_modules():
        if name in getattr(module, "lora_A", {}):
            key = key.removeprefix("base_model.model.model.").replace(".", "/")
            found[key] = module.get_delta_weight(name).detach().numpy()
    return found


@pytest.mark.parametrize(
    ("how", "count", "rank"),
    [
        ("linear", 1, None),
        ("linear", 2, None),
        ("cat", 2, None),
        ("cat", 3, None),
        ("svd", 3, None),
        ("svd", 3, 2),
        ("svd", 2, 9),
    ],
)
def test_the_combination_equals_add_weighted_adapter(how, count, rank, tmp_path):
    model, folders = make(tmp_path, count)
    names, weights = [str(i) for i in range(count)], WEIGHTS[:count]
    model.base_model.add_weighted_adapter(
        names, weights, "all", combination_type=how, svd_rank=rank
    )
    made = combine_adapters(
        list(map(open_adapter, folders)), weights, how, svd_rank=rank
    )
    expected = updates(model, "all")
    assert made.tensors.keys() == expected.keys()
    for path, pair in made.tensors.items():
        ours = made.scalings[path] * (pair["lora_A"] @ pair["lora_B"]).T
        # PEFT decomposes in float32, where errors go with the largest singular value.
        scale = float(np.linalg.norm(expected[path], 2)) if how == "svd" else 1.0
        np.testing.assert_allclose(ours, expected[path], rtol=0, atol=1e-6 * scale)
    assert made.config.r == model.peft_config["all"].r


def test_peft_reads_the_combination(tmp_path):
    model, folders = make(tmp_path, 3)
    made = combine_adapters(list(map(open_adapter, folders)), WEIGHTS, "cat")
    write_adapter_folder(made, tmp_path / "all")
    model.base_model.add_weighted_adapter(
        ["0", "1", "2"], WEIGHTS, "all", combination_type="cat"
    )
    model.set_adapter("all")
    tokens = llamas.random_tokens()
    again = PeftModel.from_pretrained(llamas.load(tmp_path / "base"), tmp_path / "all")
    np.testing.assert_allclose(
        llamas.torch_logits(again.eval(), tokens),
        llamas.torch_logits(model, tokens),
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_one_after_another_equals_pefts_merge_of_several(dtype, tmp_path):
    model, folders = make(tmp_path, 3, dtype)
    merged = model.merge_and_unload(adapter_names=["0", "1", "2"]).state_dict()
    source = tmp_path / "base"
    for index, folder in enumerate(folders):
        out = tmp_path / f"merged{index}"
        to_hf.main(to_hf.Arguments(folder, str(out), model=str(source), verify=False))
        source = out
    ours = convert.load(str(source), dtype="keep")[1]
    for key, path in (
        ("model.layers.1.self_attn.v_proj.weight", ("self_attn", "v_proj")),
        ("model.layers.1.mlp.down_proj.weight", ("mlp", "down_proj")),
    ):
        kernel = np.asarray(ours["layers"]["1"][path[0]][path[1]]["kernel"])
        expected = merged[key].float().numpy().T
        np.testing.assert_array_equal(kernel.astype(np.float32), expected)
