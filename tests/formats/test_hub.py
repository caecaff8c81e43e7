import pytest

from jlora.formats.hub import is_hub_id, nothing_there


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo" / "base").mkdir(parents=True)


@pytest.mark.parametrize(
    "name",
    [
        "meta-llama/Llama-3.2-1B",
        "owner/name@v1",
        "owner/name@refs/pr/1",
        "a_b/_c",
        "demo/Llama@main",
    ],
)
def test_what_is_a_hub_id(name):
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name",
    [
        "demo/base",
        "demo/bse",
        "name",
        "a/b/c",
        "./a/b",
        "../name",
        "~/name",
        "/owner/name",
        "owner/",
        "owner/name/",
        "owner//name",
        "owner/na me",
        "owner/-name",
        "owner/name.",
        "owner/na--me",
        "owner/na..me",
        "owner/name@",
        "owner/model.gguf",
        "owner/model.safetensors",
        "owner/name.git",
        "öwner/name",
        "owner/name\n",
        "owner/" + "n" * 91,
        "n" * 300,
        "demo/base@main/../../..\0",
    ],
)
def test_what_is_no_hub_id(name):
    assert not is_hub_id(name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("demo/bse", "did you mean 'demo/base'?"),
        ("dmo/bas", "did you mean 'demo/base'?"),
        ("demo/Llama-3.2-1B", "give demo/Llama-3.2-1B@main"),
        ("demo/base/model", "no such file or folder; give a model or a hub id"),
    ],
)
def test_the_message_names_what_was_probably_meant(name, hint):
    assert hint in str(nothing_there(name, "a model"))
