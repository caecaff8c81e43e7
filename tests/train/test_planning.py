import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from jlora.config.lora_config import LoraConfig
from jlora.config.run_config import ComputeConfig, MeshConfig
from jlora.errors import UsageError
from jlora.lora.initialisation import add_lora
from jlora.parallel.described_devices import described_devices
from jlora.parallel.sharding import make_mesh
from jlora.train.memory_estimate import host_bytes
from jlora.train.plan_lines import memory_table, plan_lines
from jlora.train.planning import Planner, planned_bytes, usable_bytes

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
QV, ALL = LoraConfig(r=8), LoraConfig(r=16, target_modules="all-linear")


@pytest.fixture(scope="module")
def planner() -> Any:
    """Makes a planner for one of the benchmarks' models, with fewer layers if wished."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        base_of = importlib.import_module("memory_table").base_of
        models = importlib.import_module("step_time")

    smallest = models.llama(478, 64, 96, 2, 4, 2, theta=1e4)

    def made(model: str, rows: int, length: int, **changes: Any) -> Planner:
        config = smallest if model == "SMALLEST" else getattr(models, model)
        layers = changes.pop("layers", config.num_hidden_layers)
        config = replace(config, num_hidden_layers=layers)
        lora, compute = changes.pop("lora", ALL), ComputeConfig(**changes)
        base = base_of(config, compute.base_dtype)
        params = jax.eval_shape(
            lambda base: add_lora(base, lora, jax.random.key(0)), base
        )
        return Planner(config, params, compute, rows, 1, length)

    return made


def on(name: str) -> Any:
    return make_mesh(MeshConfig(), described_devices(name))


def cpu() -> Any:
    return make_mesh(MeshConfig(1))


# Peak resident memory of `train.py` after one or two steps, in GiB: model, rows, length, dtype,
# adapter. See docs/performance.md.
ON_CPU = [
    ("SMALLEST", 8, 64, "float32", QV, 0.334),
    ("SMOLLM2", 4, 256, "float32", QV, 2.695),
    ("SMOLLM2", 8, 512, "float32", QV, 6.966),
    ("SMOLLM2", 4, 512, "bfloat16", ALL, 4.511),
]


@pytest.mark.parametrize(("model", "rows", "length", "dtype", "lora", "gib"), ON_CPU)
def test_a_process_on_a_cpu_takes_what_is_planned(
    planner, model, rows, length, dtype, lora, gib
):
    made = planner(model, rows, length, lora=lora, dtype=dtype, base_dtype=dtype)
    for remat in ("auto", "full"):  # XLA merges what is recomputed
        compute = replace(made.compute, remat=remat)
        work = replace(made, compute=compute).on(cpu())
        found = sum(planned_bytes(made.params, work).values()) / 2**30
        assert found == pytest.approx(gib, rel=0.15)


@pytest.mark.parametrize(
    "changes",
    [
        {"base_dtype": "nf4"},
        {"lora": replace(QV, use_dora=True)},
        {"lora": replace(QV, target_modules=["q_proj", "lm_head"])},
    ],
)
def test_what_was_not_measured_on_a_cpu_is_not_estimated(planner, changes):
    settings = {"base_dtype": "float32", "layers": 1} | changes
    made = planner("TINY", 1, 32, **settings)
    assert planned_bytes(made.params, made.on(cpu())) == {}


@pytest.mark.parametrize(
    ("device", "batch", "sizes"),
    [
        ("h200:2", 4, {"data": 2}),
        ("l4:4", 4, {"fsdp": 4}),
        ("h200:4", 2, {"data": 2, "context": 2}),
    ],
)
def test_auto_takes_the_fastest_mesh_that_fits(planner, device, batch, sizes):
    """Sixteen layers of 70B fit one H200 and not one L4; two rows do not feed four devices."""
    made = planner("LLAMA_3_70B", batch, 4096, base_dtype="bfloat16", layers=16)
    mesh = made.mesh(MeshConfig(auto=True), device)
    assert {axis: size for axis, size in mesh.shape.items() if size > 1} == sizes


def test_auto_says_why_no_mesh_divides(planner):
    made = planner("TINY", 1, 32, base_dtype="bfloat16")
    with pytest.raises(UsageError, match=r"no mesh of 3 devices: .* does not divide"):
        made.mesh(MeshConfig(auto=True), "h200:3")


def lines_of(made: Planner, mesh: Any, **changes: Any) -> str:
    work = made.on(mesh, **changes)
    return "\n".join(plan_lines(made, work, mesh, 100))


def test_the_largest_sizes_fit_and_more_does_not(planner):
    made = planner("LLAMA_3_8B", 1, 4096, base_dtype="bfloat16", layers=16)
    mesh = on("l4")
    text = lines_of(made, mesh)
    rows = int(text.partition("train.batch_size ")[2].split()[0].replace(",", ""))
    length = int(text.partition("data.seq_len ")[2].split()[0].replace(",", ""))
    for size, name in ((rows, "rows"), (length, "length")):
        for factor, fits in ((1, True), (1.1, False)):
            work = made.on(mesh, **{name: int(size * factor) + (factor > 1)})
            needed = sum(planned_bytes(made.params, work).values())
            assert (needed <= usable_bytes(mesh)) is fits


@pytest.mark.parametrize(
    ("device", "settings", "rows", "helps", "useless"),
    [
        ("l4", {"remat": "full"}, 8, ["remat offload", "fewer rows"], ["remat full"]),
        ("l4", {"remat": "none"}, 1, ["minimal, full or offload"], ["fewer rows"]),
        ("l4", {}, 4096, ["fewer rows", "nf4"], ["remat"]),
        ("rtx3090", {"base_dtype": "nf4"}, 4096, ["seq_len"], ["nf4"]),
    ],
)
def test_advice_names_only_what_helps(planner, device, settings, rows, helps, useless):
    settings = {"base_dtype": "bfloat16", "layers": 4} | settings
    text = lines_of(planner("LLAMA_3_70B", rows, 8192, **settings), on(device))
    (advice,) = [line for line in text.splitlines() if "to make it fit" in line]
    assert all(word in advice for word in helps)
    assert not any(word in advice for word in useless)


def test_advice_for_weights_alone_that_are_too_large(planner):
    made = planner("LLAMA_3_70B", 8, 4096, base_dtype="bfloat16", layers=16)
    (advice,) = [x for x in lines_of(made, on("l4")).splitlines() if "make it fit" in x]
    assert advice.strip() == (
        "to make it fit: compute.base_dtype nf4, or mesh.fsdp over more devices"
    )


def test_the_plan_shows_what_the_host_keeps(planner):
    made = planner("TINY", 4, 2**20, base_dtype="bfloat16", remat="offload")
    work = made.on(on("h200"))
    assert host_bytes(work) == 4 * 2**20 * made.config.hidden_size * 2
    (line,) = [x for x in memory_table(made.params, work, on("h200")) if "host" in x]
    assert f"{host_bytes(work) / 2**30:.2f} GiB" in line


def test_choices_follow_the_described_device(planner):
    made = planner("LLAMA_3_8B", 2, 4096, base_dtype="fp8", layers=1)
    found = {name: made.on(on(name)).compute for name in ("h200", "a100", "v6e")}
    assert {name: (c.attention, c.kernels) for name, c in found.items()} == {
        "h200": ("cudnn", "hopper"),
        "a100": ("cudnn", "xla"),
        "v6e": ("splash", "xla"),
    }
    assert ["fp8" in c.code_products for c in found.values()] == [True, False, False]


@pytest.mark.parametrize(
    ("model", "device", "sizes", "rows", "length", "kernels"),
    [
        ("LLAMA_3_8B", "h200", MeshConfig(1), 4, 192, "hopper"),
        ("SMOLLM2", "h200:3", MeshConfig(1, context=3), 1, 768, "auto"),
    ],
)
def test_other_sizes_are_looked_at_where_the_run_would_refuse_them(
    planner, model, device, sizes, rows, length, kernels
):
    settings = {"base_dtype": "bfloat16", "layers": 1, "kernels": kernels}
    mesh = make_mesh(sizes, described_devices(device))
    assert "largest that fits" in lines_of(
        planner(model, rows, length, **settings), mesh
    )


@pytest.mark.parametrize(
    ("device", "sizes", "is_measured"),
    [
        ("h200", MeshConfig(1), True),
        ("h200:2", MeshConfig(2), True),
        ("h200:2", MeshConfig(1, 2), False),
        ("l4", MeshConfig(1), False),
    ],
)
def test_speed_says_where_it_was_not_measured(planner, device, sizes, is_measured):
    made = planner("LLAMA_3_8B", 2, 512, base_dtype="bfloat16", layers=1)
    text = lines_of(made, make_mesh(sizes, described_devices(device)))
    assert "tokens/s" in text
    assert ("an expectation" not in text) is is_measured


def test_a_tpu_has_the_layers_twice_before_its_first_step(planner):
    made = planner("LLAMA_3_70B", 8, 512, base_dtype="bfloat16")
    mesh = make_mesh(MeshConfig(1, 8), described_devices("v6e:8"))
    parts = planned_bytes(made.params, made.on(mesh))
    of_step = parts["saved activations"] + parts["one layer, or logits"]
    layers = 80 * 2 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672) / 8
    assert parts["layers, while stacked"] + of_step == pytest.approx(layers, rel=1e-3)
    assert sum(parts.values()) > usable_bytes(mesh)
