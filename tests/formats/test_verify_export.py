import numpy as np
import pytest
from helpers.adapters import golden
from helpers.exports import export

from jlora.errors import CorruptError
from jlora.formats import verify_export
from jlora.formats.open_model import open_model
from jlora.formats.peft.adapter_reader import read_adapter


@pytest.mark.parametrize("name", ["patterns", "tied", "bf16_rslora"])
def test_exported_model_equals_base_and_adapter(name, out):
    case = golden(name)
    source, adapter = open_model(str(case.base)), read_adapter(case.folder)
    line = verify_export.verify_export(source, adapter, export(case, out))
    assert "merged to the files 0.00e+00" in line


def test_kl_of_equal_logits_is_zero():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5))
    assert verify_export._mean_kl(logits, logits + 7) == pytest.approx(0, abs=1e-15)


def test_logits_that_are_no_numbers_do_not_agree(out, monkeypatch):
    case = golden("patterns")
    source, adapter = open_model(str(case.base)), read_adapter(case.folder)
    folder = export(case, out)
    nan = np.full((2, 3, 5), np.nan)
    monkeypatch.setattr(verify_export, "_logits", lambda *_: nan)
    with pytest.raises(CorruptError, match="not the model of base and adapter"):
        verify_export.verify_export(source, adapter, folder)
