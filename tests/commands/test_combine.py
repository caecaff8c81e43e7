import jax
import numpy as np
from helpers.adapters import golden
from helpers.commands import call

from jlora.formats.peft.adapter_reader import read_adapter
from jlora.formats.peft.combine_adapters import combine_adapters


def test_the_combined_adapter_is_written_and_read_as_any_other(tmp_path):
    folders = [golden(name).folder for name in ("basic", "all_linear")]
    out = tmp_path / "out"
    words = ("--adapters", f"[{folders[0]},{folders[1]}]", "--weights", "[1,-0.5]")
    call("convert.combine", *words, out)
    done = call("convert.combine", *words, "--overwrite", "--how=cat", out)
    assert (done.status, done.err) == (0, "")
    assert "14 modules of rank 12, cat of 2 adapters" in done.out
    adapters = [read_adapter(folder) for folder in folders]
    expected = combine_adapters(adapters, [1, -0.5], "cat")
    found = read_adapter(out)
    assert found.scalings == expected.scalings
    jax.tree.map(np.testing.assert_array_equal, found.tensors, expected.tensors)
