import pytest
from helpers.fake_devices import mesh_of

from jlora.errors import UsageError
from jlora.parallel.described_devices import KINDS, described_devices, kind_of


@pytest.mark.parametrize(
    ("text", "count"), [("H100", 1), ("h200:2", 2), ("v5e:8x8", 64), ("v5p:2x2x4", 16)]
)
def test_a_name_with_a_number_of_devices(text, count):
    found = described_devices(text)
    assert len(found) == len(set(map(id, found))) == count
    assert kind_of(found[0]) is KINDS[text.lower().partition(":")[0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h20", "did you mean 'h200'"),
        ("rtx4080", "did you mean 'rtx4090'"),
        ("h200:", "number of devices after the colon"),
        ("h200:2x2", "as h200:8"),
        ("v5e:0x4", "as v5e:4x4"),
        ("v5e:32x16", "at most 256"),
    ],
)
def test_what_is_not_a_device_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        described_devices(text)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_found_by_its_own_name(name):
    assert kind_of(described_devices(name)[0]) is KINDS[name]


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6e", "v6e"),
        ("cpu", None),
    ],
)
def test_a_device_is_known_by_what_jax_calls_it(said, name):
    device = mesh_of("gpu").devices.flat[0]
    device.device_kind = said
    assert kind_of(device) is (KINDS[name] if name else None)
