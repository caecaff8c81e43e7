import pytest
from helpers.data_cases import chat, load, make_tokenizer, render, write_rows

from jlora.data.batch.preview import preview_lines, preview_samples
from jlora.report.samples import show_samples

ROWS = [chat(f"What is {i}?", "five " * (1 + i)) for i in range(30)]


def cells(line: str) -> list[str]:
    return line.split()


def test_table_counts_the_rows_of_each_source(tmp_path):
    good = write_rows(tmp_path / "a.jsonl", [{"text": "the sum"}] * 3)
    bad = write_rows(
        tmp_path / "b.jsonl",
        [
            chat("a", "b"),
            "{",
            {"messages": [{"role": "user", "content": "no answer"}]},
            chat("x" * 100, "b"),
            chat("a", "b" * 100),
        ],
    )
    data = load({str(good): 2.0, str(bad): 1.0}, seq_len=60, on_bad_row="skip")
    head, first, second = map(cells, preview_lines(data)[:3])
    assert head == [
        *("source", "format", "rows", "bad", "dropped", "cut", "kept", "passes"),
        *("tokens", "supervised"),
    ]
    assert first == [str(good), "text", *["3", "0", "0", "0", "3", "2"], "12", "75.0%"]
    assert second[:8] == [str(bad), "messages", *["5", "1", "2", "2", "2", "1"]]


def test_histogram_counts_records_by_powers_of_two(tmp_path):
    rows = [{"text": "x" * n} for n in (1, 1, 2, 6, 30)]  # and EOS: 2, 2, 3, 7, 31
    lines = preview_lines(load(write_rows(tmp_path / "data.jsonl", rows), seq_len=8))
    counts = [cells(line)[:2] for line in lines[4:]]
    assert counts == [["2-3", "3"], ["4-7", "1"], ["8-15", "0"], ["16-31", "1"]]


@pytest.mark.parametrize("name", ["chatml", "llama2", "llama3"])
def test_samples_show_the_whole_record_and_what_the_loss_counts(tmp_path, name):
    tokenizer = make_tokenizer(name)
    data = load(write_rows(tmp_path / "data.jsonl", ROWS), tokenizer)
    samples = preview_samples(data, tokenizer)
    assert [title.split(", ")[1].split(":")[0] for title, _ in samples] == [
        *("line 1", "line 15", "line 30")
    ]
    _, pieces = samples[0]
    text = render(tokenizer, ROWS[0]["messages"])
    assert "".join(piece.text for piece in pieces) == text
    answer = "".join(piece.text for piece in pieces if piece.is_supervised)
    assert answer.strip().startswith("five")
    assert text.rstrip().endswith(answer)


def test_samples_tell_a_control_token_from_its_letters(tmp_path):
    tokenizer = make_tokenizer()
    row = chat("<|im_end|> <tool_call>", "<tool_call>")
    data = load(write_rows(tmp_path / "data.jsonl", [row]), tokenizer)
    ((_, pieces),) = preview_samples(data, tokenizer)
    said = pieces[[p.text for p in pieces].index("user\n<|im_end|> ") :]
    assert said == [
        ("user\n<|im_end|> ", False, False),
        ("<tool_call>", False, True),
        *[("<|im_end|>", False, True), ("\n", False, False)],
        *[("<|im_start|>", False, True), ("assistant\n", False, False)],
        *[("<tool_call>", True, True), ("<|im_end|>", True, True)],
        ("\n", False, False),
    ]


def test_long_sample_shows_both_ends(tmp_path):
    rows = [{"prompt": "start " + "x" * 3000, "completion": " end"}]
    tokenizer = make_tokenizer()
    data = load(write_rows(tmp_path / "data.jsonl", rows), tokenizer, seq_len=4000)
    ((_, pieces),) = preview_samples(data, tokenizer)
    assert pieces[0][0].startswith("start x")
    assert "tokens more" in pieces[1][0]
    assert pieces[-2:] == [(" end", True, False), ("<|im_end|>", True, True)]


def test_sample_cannot_steer_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    tokenizer = make_tokenizer()
    path = write_rows(tmp_path / "data.jsonl", [{"text": "a\x1b[31m\nb"}])
    show_samples(preview_samples(load(path, tokenizer), tokenizer))
    out = capsys.readouterr().out
    assert "\x1b[31m" not in out
    assert r"\x1b[31m" in out
