"""What PEFT makes of every golden adapter that was read and written again."""

import llamas
import numpy as np
import pytest
from helpers.adapters import CASES, GOLDEN, Case, golden
from peft import PeftModel

from convert import to_peft
from jlora.formats.peft.adapter_reader import read_adapter
from jlora.formats.peft.adapter_writer import save_adapter

# Written from a tree, those of another base than the one given would have to become
# plain LoRA or bring tables first.
FROM_TREE = [name for name in CASES if name not in ("pissa", "olora", "resized_vocab")]


def logits_of_peft(case: Case, adapter) -> np.ndarray:
    base = llamas.load(case.base)
    if "resized_vocab" in case.folder.name:
        base.resize_token_embeddings(84, mean_resizing=False)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    return llamas.torch_logits(model, case.expected["input_ids"])


@pytest.mark.parametrize("name", CASES)
def test_peft_computes_the_same_from_a_folder_written_again(
    name, tmp_path, monkeypatch
):
    monkeypatch.chdir(GOLDEN)  # which the adapters name their bases from
    case = golden(name)
    out = tmp_path / "out"
    to_peft.main(to_peft.Arguments(out=str(out), adapter=str(case.folder)))
    logits = logits_of_peft(case, out)
    np.testing.assert_allclose(logits, case.expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FROM_TREE)
def test_peft_computes_the_same_from_a_tree_written_as_a_folder(name, tmp_path):
    case = golden(name)
    _, _, params = case.load()
    out = tmp_path / "out"
    save_adapter(params, read_adapter(case.folder).config, out)
    logits = logits_of_peft(case, out)
    np.testing.assert_allclose(logits, case.expected["logits"], rtol=0, atol=1e-4)
