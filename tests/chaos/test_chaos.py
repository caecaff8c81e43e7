from functools import partial
from pathlib import Path

import pytest

from chaos.damage import adapter_content, base_content, cached_content, damage_all
from chaos.kills import kill_training, kill_writing
from chaos.lab import Lab


@pytest.mark.slow
def test_some_kills_and_damages_end_in_the_same_result_or_a_refusal(
    tmp_path, monkeypatch
):
    """The short form of `make chaos`; what is wrong is listed by the failure."""
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    monkeypatch.chdir(tmp_path)
    lab = Lab(tmp_path, seed=0)
    kill_training(lab, 1)

    def convert(out: Path) -> list[object]:
        return ["hf", out]

    kill_writing(lab, 2, "convert.from_hf", convert, "--dtype", "bfloat16")
    base = tmp_path / "new-convert.from_hf"
    damage_all(lab, "base", base, base_content, most=20)
    cache = partial(cached_content, lab)
    damage_all(lab, "cache", tmp_path / "cache", cache, most=10)
    damage_all(lab, "run", tmp_path / "whole1", adapter_content, most=20)
    assert sum(counts.total() for counts in lab.table.values()) == 53
    assert lab.wrong == []
