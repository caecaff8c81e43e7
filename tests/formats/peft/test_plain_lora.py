import numpy as np
import pytest
from helpers.adapters import GOLDEN, golden
from helpers.exports import peft_for

from jlora.formats.peft.attach_adapter import attach_adapter


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_pissa_and_olora_are_written_as_plain_lora(name, out, monkeypatch):
    monkeypatch.chdir(GOLDEN)
    adapter = peft_for("peft", golden(name).folder, out)
    assert adapter.config.init_lora_weights is True
    assert (adapter.config.r, adapter.config.lora_alpha) == (16, 32)
    model, base, _ = golden(name).load()
    params = attach_adapter(base, model.config, adapter)
    logits = model.apply({"params": params}, golden(name).tokens)
    np.testing.assert_allclose(logits, golden(name).expected["logits"], atol=1e-4)
