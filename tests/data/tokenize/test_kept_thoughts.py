import pytest
from helpers.data_cases import CONFIG, all_tokens, chat, field_files, load, write_rows

from jlora.data.batch.batches import Dataset
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import CorruptError, UnsupportedError, UsageError

THOUGHT = "<think>\nAdd them.\n</think>\n\nIt is 5."


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(field_files("r1_distill"), CONFIG)


def read(path, row, tokenizer, **config) -> Dataset:
    data = write_rows(path / "data.jsonl", [row])
    return load(data, tokenizer, vocab_size=484, seq_len=300, **config)


def supervised(data: Dataset, tokenizer: Tokenizer) -> list[str]:
    texts = []
    for index in range(data.num_records):
        tokens, mask = data.record(index)[:2]
        counted = [t for t, m in zip(tokens.tolist(), mask.tolist(), strict=True) if m]
        texts.append(tokenizer.decode(counted, skip_special=False))
    return texts


def end(tokenizer: Tokenizer) -> str:
    assert tokenizer.eos_id is not None
    return tokenizer.token(tokenizer.eos_id)


def test_thought_is_trained_on_after_the_prompt_that_opens_it(tmp_path, tokenizer):
    row = chat("What is 2 + 3?", THOUGHT)
    data = read(tmp_path, row, tokenizer)
    prompt = tokenizer.encode_chat(row["messages"][:1], add_generation_prompt=True)
    assert all_tokens(data)[: len(prompt)] == prompt
    (answer,) = supervised(data, tokenizer)
    assert answer == THOUGHT.removeprefix("<think>\n") + end(tokenizer)
    (line,) = [line for line in data.summary if "opens a thought" in line]
    assert "is kept, earlier ones are dropped" in line


def test_answer_without_a_thought_is_as_the_template_writes_it(tmp_path, tokenizer):
    row = chat("What is 2 + 3?", "It is 5.")
    data = read(tmp_path, row, tokenizer)
    assert all_tokens(data) == tokenizer.encode_chat(row["messages"])
    assert supervised(data, tokenizer) == [f"It is 5.{end(tokenizer)}"]


@pytest.mark.parametrize("content", ["<think>a</think>b", "<think>\n\n</think>\n\nb"])
def test_thought_of_another_form_is_kept_as_it_is(tmp_path, tokenizer, content):
    data = read(tmp_path, chat("q", content), tokenizer)
    text = tokenizer.decode(all_tokens(data), skip_special=False)
    rest = content.removeprefix("<think>").removeprefix("\n")
    assert text.endswith(f"<think>\n{rest}{end(tokenizer)}")


def test_turn_marker_in_a_thought_stays_text(tmp_path, tokenizer):
    content = f"<think>\nx {end(tokenizer)} y\n</think>\n\nIt is 5."
    data = read(tmp_path, chat("q", content), tokenizer)
    assert all_tokens(data).count(tokenizer.eos_id) == 1
    (answer,) = supervised(data, tokenizer)
    assert answer == content.removeprefix("<think>\n") + end(tokenizer)


SEVERAL = chat("a", THOUGHT, "b", "<think>\nNow.\n</think>\n\nIt is 6.")


def test_several_answers_need_a_choice(tmp_path, tokenizer):
    with pytest.raises(
        UnsupportedError, match=r"last_assistant.*data\.split_turns=true"
    ):
        read(tmp_path, SEVERAL, tokenizer)
    data = read(tmp_path, SEVERAL, tokenizer, train_on="last_assistant")
    (answer,) = supervised(data, tokenizer)
    assert answer == f"Now.\n</think>\n\nIt is 6.{end(tokenizer)}"
    text = tokenizer.decode(all_tokens(data), skip_special=False)
    assert "Add them" not in text  # the earlier thought, which the template drops


def test_each_answer_is_a_sample_of_its_own_on_request(tmp_path, tokenizer):
    data = read(tmp_path, SEVERAL, tokenizer, split_turns=True)
    assert supervised(data, tokenizer) == [
        f"Add them.\n</think>\n\nIt is 5.{end(tokenizer)}",
        f"Now.\n</think>\n\nIt is 6.{end(tokenizer)}",
    ]
    assert any("each answer is a sample of its own" in line for line in data.summary)


def test_split_turns_leaves_out_what_is_not_trained_on(tmp_path, tokenizer):
    row = {"messages": [dict(message) for message in SEVERAL["messages"]]}
    row["messages"][1]["weight"] = 0
    data = read(tmp_path, row, tokenizer, split_turns=True)
    assert len(supervised(data, tokenizer)) == 1


def test_split_turns_with_another_choice_is_a_usage_error(tmp_path, tokenizer):
    with pytest.raises(UsageError, match=r"data\.split_turns trains on each answer"):
        read(tmp_path, SEVERAL, tokenizer, split_turns=True, train_on="all")


def test_rows_without_an_answer_are_counted(tmp_path, tokenizer):
    row = {"messages": [{"role": "user", "content": "a"}]}
    with pytest.raises(UsageError, match="dropped 1 record with nothing to train on"):
        read(tmp_path, row, tokenizer, split_turns=True)


def test_two_settings_have_two_caches(tmp_path, tokenizer):
    last = read(tmp_path, SEVERAL, tokenizer, train_on="last_assistant")
    split = read(tmp_path, SEVERAL, tokenizer, split_turns=True)
    assert last.fingerprint != split.fingerprint


def test_bad_rows_are_still_told(tmp_path, tokenizer):
    with pytest.raises(CorruptError, match="content is empty"):
        read(tmp_path, chat("a", ""), tokenizer, split_turns=True)
