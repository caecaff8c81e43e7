from pathlib import Path
from typing import Any

import pytest

from jlora.config.lora_config import LoraConfig
from jlora.formats.model_card import model_card
from jlora.report.run_folder import RunFolder


def card(base: str = "meta/base", **data: Any) -> str:
    run = RunFolder("run", {"data": data}, {}, [])
    return model_card("me/mine", base, None, "merged", lora=LoraConfig(), run=run)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("owner/name:config/train", "owner/name:config/train"),
        ("owner/name@v1", "owner/name@v1"),
        ("/home/me/data/train.jsonl", "train.jsonl"),
        (["data/a.jsonl", "owner/name"], "a.jsonl, owner/name"),
        ({"../secret/b.jsonl": 2.0}, "b.jsonl"),
    ],
)
def test_data_is_named_by_its_hub_id_or_file(given, named):
    assert f"| data | {named} |" in card(train=given)


def test_a_folder_that_is_where_the_run_was_started_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "records").mkdir()
    monkeypatch.chdir(tmp_path / "records")
    assert "| data | records |" in card(train=".")


def test_only_a_hub_id_is_a_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "base_model: meta/base" in card()
    Path("models").mkdir()
    assert "base_model:" not in card("models/moved")
