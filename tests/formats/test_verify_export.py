import numpy as np
import pytest
from helpers.adapters import (
    golden,
)
from helpers.exports import export

from jlora.formats import verify_export
from jlora.formats.open_model import open_model
from jlora.formats.peft.adapter_reader import read_adapter
from jlora.formats.verify_export import compare


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.mark.parametrize("name", ["patterns", "tied", "bf16_rslora"])
def test_exported_model_equals_base_and_adapter(name, out):
    case = golden(name)
    source, adapter = open_model(str(case.base)), read_adapter(case.folder)
    differences = compare(source, adapter, export(case, out))
    assert differences.are_small
    assert differences.memory_to_disk == 0


def test_kl_of_equal_logits_is_zero():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5))
    assert verify_export._mean_kl(logits, logits + 7) == pytest.approx(0, abs=1e-15)
