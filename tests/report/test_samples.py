from jlora.report.samples import show_samples


def test_samples_mark_supervised_text_without_a_terminal(capsys):
    show_samples(
        [
            (
                "a.jsonl, line 1",
                [
                    ("[bold] ask ", False, False),
                    ("an", True, False),
                    ("<e>", True, True),
                ],
            )
        ]
    )
    assert capsys.readouterr().out == "a.jsonl, line 1\n[bold] ask {+an[[<e>]]+}\n\n"


def test_samples_are_coloured_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    show_samples(
        [
            (
                "title",
                [("ask ", False, False), ("answer", True, False), ("<e>", True, True)],
            )
        ]
    )
    out = capsys.readouterr().out
    assert "\x1b[1;32manswer\x1b[0m" in out
    assert "\x1b[1;4;32m<e>\x1b[0m" in out
    assert "{+" not in out
    assert "[[" not in out
