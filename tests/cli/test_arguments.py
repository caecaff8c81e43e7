from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
from helpers.flag_cases import Arguments, Group, Placed

import train
from jlora.cli.arguments import parse, with_changes
from jlora.config.sampling_config import TextConfig
from jlora.errors import UnsupportedError, UsageError


def read(*words: str) -> Arguments:
    return parse(Arguments, ["--model", "m", *words])


def message(*words: str, cls: type = Arguments) -> str:
    with pytest.raises(UsageError) as error:
        parse(cls, list(words))
    return str(error.value)


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> str:
        file = tmp_path / "c.yaml"
        file.write_text(text)
        return str(file)

    return write


def test_defaults_are_those_of_the_dataclasses():
    assert read() == Arguments(model="m")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--group.rank", "4"], Group(rank=4)),
        (["--group.rank=4"], Group(rank=4)),
        (["--group.rate", "1e-4"], Group(rate=1e-4)),
        (["--group.rate", "3"], Group(rate=3.0)),
        (["--group.names", "[a,b]"], Group(names=["a", "b"])),
        (["--group.names", "all"], Group(names="all")),
        (["--group.names", ".*\\.(q|v)_proj"], Group(names=".*\\.(q|v)_proj")),
        (["--group.ranks", "{a: 4}"], Group(ranks={"a": 4})),
        (["--group.is_fast"], Group(is_fast=True)),
        (["--group.is_fast", "true"], Group(is_fast=True)),
        (["--group.is_fast=true"], Group(is_fast=True)),
        (["--group.is_fast", "false"], Group(is_fast=False)),
        (["--group.is_fast", "--plan"], Group(is_fast=True)),
        (["--group", "is_fast"], Group(is_fast=True)),
        (["--group=is_fast", "--plan"], Group(is_fast=True)),
    ],
)
def test_a_flag_sets_its_field(words, expected):
    assert read(*words).group == expected


def test_a_group_of_a_file_may_be_the_name_of_its_switch(config):
    file = config("model: m\ngroup: is_fast\n")
    assert parse(Arguments, ["--config", file]).group == Group(is_fast=True)
    file = config("model: m\ngroup: rank\n")
    assert "expected keys below it" in message("--config", file)


def test_a_group_with_what_is_no_switch_is_unknown():
    assert "unknown flag --group" in message("--model", "m", "--group", "rank")


def test_a_bare_switch_at_the_end_is_on():
    assert read("--plan").plan is True


def test_a_switch_with_three_states_can_be_bare():
    assert read("--verify").verify is True
    assert read("--verify", "false").verify is False


def test_a_bare_switch_leaves_a_positional_word_alone():
    got = parse(Placed, ["--plan", "m"])
    assert got == Placed(model="m", plan=True)


def test_a_field_named_like_a_keyword_has_a_plain_flag():
    assert read("--for", "you").for_ == "you"


@pytest.mark.parametrize(
    "value",
    [
        "123",
        "a: b",
        "-1",
        "true",
        "",
        "[a",
        "- a",
        "# Title",
        " ",
        "null # c",
        "+49",
    ],
)
def test_text_stays_text(value):
    assert read("--text", value).text == value


def test_text_that_looks_like_a_flag_is_given_with_an_equals_sign():
    assert read("--text=--plan").text == "--plan"
    assert read("--text=---").text == "---"
    assert "--text=VALUE" in message("--model", "m", "--text", "-x")


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--modle", "--model"),
        ("--group.rnak", "--group.rank"),
        ("--rank", "--group.rank"),
        ("--rnak", "--group.rank"),
        ("--grp.rank", "--group.rank"),
        ("--pln=true", "--plan"),
    ],
)
def test_an_unknown_flag_is_answered_with_the_nearest(word, hint):
    name = word.split("=")[0]
    assert message(word, "x") == f"unknown flag {name}; did you mean {hint}?"


def test_a_flag_given_again_replaces_the_one_before():
    assert read("--model", "m", "--group.rank", "2", "--group.rank=3").group.rank == 3


def test_all_unknown_flags_and_all_unknown_keys_are_named_at_once(config):
    assert message("--modle", "m", "--zzz=1", "--rnak", "2") == (
        "unknown flags --modle (did you mean --model?), --zzz, "
        "--rnak (did you mean --group.rank?)"
    )
    file = config("modle: m\ngroup: {rnak: 2, rate: 1}\nzzz: {a: 1}\n")
    assert message("--config", file) == (
        f"{file}: unknown keys 'modle' (did you mean 'model'?), "
        "'group.rnak' (did you mean 'group.rank'?), 'zzz.a'"
    )


@pytest.mark.parametrize("word", ["--zzz", "--mod", "--group", "--group.names+"])
def test_an_abbreviation_or_a_group_is_no_flag(word):
    assert message("--model", "m", word, "x").startswith(f"unknown flag {word}")


def test_missing_flags_are_named_with_their_meaning():
    assert message() == "missing: --model (Where the model is); --help lists all"


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["a"], "a"),
        (["a", "b"], ["a", "b"]),
        (["a", "-b", "c d", "e,f"], ["a", "-b", "c d", "e,f"]),
        (["[a,b]"], ["a", "b"]),
    ],
)
def test_a_list_may_be_several_words(words, names):
    for after in ([], ["--plan"], ["--text", "x"]):
        assert read("--group.names", *words, *after).group.names == names


def test_words_after_a_list_are_positional_where_a_command_has_some():
    words = ["--group.names", "a", "m"]
    got = parse(Placed, words)
    assert (got.model, got.group.names) == ("m", "a")


def test_missing_words_are_named_in_capitals():
    said = message(cls=Placed)
    assert said == "missing: MODEL (Where the model is); --help lists all"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--group.rank", "eight"], "--group.rank is 'eight'; expected an integer"),
        (["--group.rank", "8.0"], "--group.rank is '8.0'; expected an integer"),
        (["--group.rank", ""], "--group.rank is ''; expected an integer"),
        (["--group.rank", "010"], "--group.rank is '010'; expected an integer"),
        (["--group.rank", "9" * 5000], "999'; expected an integer"),
        (["--group.rank", "true"], "--group.rank is 'true'; expected an integer"),
        (["--plan=1"], "--plan is '1'; expected true or false"),
        (["--group.rate", "fast"], "--group.rate is 'fast'; expected a number"),
        (["--group.rate", "nan"], "--group.rate is 'nan'; expected a number"),
        (["--plan=maybe"], "--plan is 'maybe'; expected true or false"),
        (
            ["--when", "nevr"],
            "--when is 'nevr'; expected one of auto, never; did you mean 'never'?",
        ),
        (["--group.ranks", "{a:4}"], "expected a mapping such as {name: value}"),
        (["--group.ranks", "{a: b}"], "expected a mapping such as {name: value}"),
        (["--group.rank"], "--group.rank needs a value: an integer"),
        (["--text", "a", "b"], "unexpected: b; "),
        (["--plan", "yes"], "unexpected: yes; "),
    ],
)
def test_a_wrong_value_is_told_with_what_was_expected(words, said):
    assert said in message("--model", "m", *words)


def test_a_file_gives_values_by_the_same_keys(config):
    file = config("model: n\nplan: true\ngroup: {rate: 1e-4, names: [a, b]}\n")
    assert parse(Arguments, ["--config", file]) == Arguments(
        model="n", plan=True, group=Group(rate=1e-4, names=["a", "b"])
    )


def test_an_integer_in_a_file_serves_as_text(config):
    assert read("--config", config("text: 20240101")).text == "20240101"


def test_changes_are_checked_as_flags_are_and_keep_the_rest():
    given = read("--group.rank", "4", "--plan")
    changed = with_changes(given, {"group": {"rate": 1}, "group.names": "a"}, "f: x")
    assert changed == read(
        *("--group.rank", "4", "--plan", "--group.rate", "1", "--group.names", "a")
    )
    with pytest.raises(UsageError, match=r"f: x: group\.rank is the text 'a'"):
        with_changes(given, {"group.rank": "a"}, "f: x")


def test_a_file_may_use_dotted_keys(config):
    assert read("--config", config("group.rank: 3")).group.rank == 3


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("flags", [["--group.rank", "2"], ["--group.rank=2"]])
def test_flags_beat_the_file_wherever_it_stands(config, first, flags):
    given = ["--config", config("group: {rank: 3, rate: 0.1}")]
    got = read(*given, *flags) if first else read(*flags, *given)
    assert got.group == Group(rank=2, rate=0.1)


def test_a_bare_switch_beats_the_file(config):
    assert read("--plan", "--config", config("plan: false")).plan is True


@pytest.mark.parametrize(
    "text", ["group:\n", "group: {}\n", "text: null\n", "text: ~\n", "# nothing\n"]
)
def test_an_empty_group_or_null_keeps_the_defaults(config, text):
    if text.startswith("#"):
        text += "plan: false\n"
    assert read("--config", config(text)) == Arguments(model="m")


@pytest.mark.parametrize("text", ["yes", "no", "on", "1:30", "2001-01-01", "0x1F"])
def test_what_yaml_1_1_would_turn_into_something_else_is_text(config, text):
    assert read("--config", config(f"text: {text}")).text == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('group: {rank: "8"}', "group.rank is the text '8'; expected an integer"),
        ("group: {rate: fast}", "group.rate is the text 'fast'; expected a number"),
        ("plan: yes", "plan is the text 'yes'; expected true or false"),
        ("plan: 1", "plan is '1'; expected true or false"),
        ("text: 1.50", "text is '1.5'; expected text"),
        ("group: {names: [1.5]}", "expected a list such as [first,second] or text"),
        ("group: {rank: 1.5}", "group.rank is '1.5'; expected an integer"),
        ("group: {rank: null}", "group.rank is 'null'; expected an integer"),
        ("group: {rank: [1]}", "expected an integer"),
        ("group: {rank: {a: 1}}", "expected an integer"),
        ("group: 8", "group is 8; expected keys below it: rank, rate, is_fast"),
        ("group: {rnak: 8}", "unknown key 'group.rnak'; did you mean 'group.rank'?"),
        ("modle: x", "unknown key 'modle'; did you mean 'model'?"),
        ("zzz: {a: 1}", "unknown key 'zzz.a'"),
        ("config: x.yaml", "unknown key 'config'"),
        ("when: sometimes", "when is 'sometimes'; expected one of auto, never"),
        ("plan: true\nplan: false", "line 1, column 1: not valid YAML: the key 'plan'"),
        ("text: &a x\nmodel: *a", "line 1, column 7: not valid YAML: anchors"),
        ("text: !!python/name:os.system", "line 1, column 7: not valid YAML"),
        ("text: [a", "line 1, column 9: not valid YAML"),
        ("- a", "expected keys and values"),
        ("", "expected keys and values"),
        ("{a: b}: c", "not valid YAML"),
        ("1: 2", "unknown key '1'"),
    ],
)
def test_a_fault_of_the_file_is_told_with_file_and_key(config, text, said):
    file = config(text)
    got = message("--model", "m", "--config", file)
    assert got.startswith(file)
    assert said in got


def test_deeply_nested_yaml_is_refused(config):
    assert "nested too deeply" in message("--config", config("[" * 5000 + "]" * 5000))


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"model: \xff\xfe")
    assert "not valid YAML" in message("--config", str(tmp_path / "c.yaml"))


def test_a_missing_file_is_told():
    assert message("--config", "no.yaml") == (
        "no.yaml: cannot be read (No such file or directory)"
    )


@pytest.mark.parametrize("words", [["--config"], ["--config="], ["--config", "--plan"]])
def test_config_without_a_file_is_told(words):
    assert message("--model", "m", *words) == "--config needs a YAML file"


def test_two_files_are_refused():
    assert "2 times" in message("--config", "a.yaml", "--config=b.yaml")


def test_words_of_a_command_may_have_their_name_but_are_no_keys_of_a_file(config):
    assert parse(Placed, ["--model", "m"]) == parse(Placed, ["m"])
    assert message("--model", "m", "n", cls=Placed).startswith("unexpected: n;")
    said = message("--config", config("model: m"), cls=Placed)
    assert "unknown key 'model'" in said


@pytest.mark.parametrize("way", ["flag", "file"])
def test_a_field_of_peft_that_changes_nothing_is_taken(way, config):
    place = ["--model", "m", "--output_dir", "o"]
    words = ["--lora.task_type", "CAUSAL_LM", "--lora.loftq_config", "{}"]
    text = "lora: {task_type: CAUSAL_LM, loftq_config: {}, lora_bias: false}"
    given = words if way == "flag" else ["--config", config(text)]
    assert parse(train.Arguments, [*place, *given]) == parse(train.Arguments, place)
    with pytest.raises(UnsupportedError, match=r"task_type='SEQ_CLS' \(jlora has"):
        parse(train.Arguments, [*place, "--lora.task_type", "SEQ_CLS"])


def test_a_number_with_a_comment_is_no_number():
    assert "--group.rank is '5 # c'" in message("--model", "m", "--group.rank", "5 # c")


@pytest.mark.parametrize(
    "text", ["group: {rank: 4}\ngroup.rank: 5\n", "group.rank: 5\ngroup: {rank: 4}\n"]
)
def test_a_key_that_is_given_nested_and_dotted_is_refused(text, config):
    assert "group.rank is given twice" in message(
        "--model", "m", "--config", config(text)
    )


def test_names_that_are_one_as_text_are_refused():
    words = ("--model", "m", "--group.ranks", '{1: 1, "1": 2}')
    assert "--group.ranks is" in message(*words)


def test_a_flag_replaces_what_a_file_says_in_another_way(config):
    file = config("group: {rank: 4, rate: 0.1}")
    got = read("--config", file, "--group.share", "0.5")
    assert got.group == Group(share=0.5, rate=0.1)
    both = config("group: {rank: 4, share: 0.5}")
    assert read("--config", both).group == Group(rank=4, share=0.5)


def changed(config, group: str, text: str, *words: str) -> dict[str, Any]:
    """Returns what a file and flags of `train` say of a group and is not the default."""
    required = ["--model", "m", "--output_dir", "o"]
    args = parse(train.Arguments, [*required, "--config", config(text), *words])
    found = asdict(getattr(args, group))
    usual = asdict(type(getattr(args, group))())
    return {name: value for name, value in found.items() if value != usual[name]}


@pytest.mark.parametrize(
    ("key", "value", "off", "partner", "other"),
    [
        ("train.max_steps", "5", "0", "train.num_epochs", 3.0),
        ("optim.warmup_steps", "5", "0", "optim.warmup_ratio", 0.1),
        ("data.eval", "e.jsonl", "null", "data.eval_fraction", 0.2),
        ("data.eval_fraction", "0.3", "0", "data.eval", "f.jsonl"),
    ],
)
def test_a_flag_that_is_off_keeps_what_the_file_says_instead(
    config, key, value, off, partner, other
):
    group, _, name = partner.partition(".")
    text = f"{partner}: {other}"
    assert changed(config, group, text, f"--{key}", off) == {name: other}
    assert name not in changed(config, group, text, f"--{key}", value)
    last_is_off = (f"--{key}", value, f"--{key}", off)
    assert changed(config, group, text, *last_is_off) == {name: other}


@pytest.mark.parametrize(
    ("text", "flag", "value", "expected"),
    [
        ("max_steps: 9", "train.num_epochs", "1", {}),
        ("max_steps: 9", "train.num_epochs", "2", {"num_epochs": 2.0}),
        ("warmup_steps: 9", "optim.warmup_ratio", "0", {"warmup_ratio": 0.0}),
        ("warmup_steps: 9", "optim.warmup_ratio", "0.03", {}),
        ("{data: 1, fsdp: 2, tensor: 2}", "mesh", "auto", {"auto": True}),
        ("{data: 1, fsdp: 2}", "mesh.auto", "false", {"data": 1, "fsdp": 2}),
        ("auto", "mesh.fsdp", "2", {"fsdp": 2}),
        ("auto", "mesh.data", "0", {}),
        ("{to: trackio, project: p}", "report.to", "", {}),
        (
            "{eval_every: 2, keep_best: true, early_stopping_patience: 3}",
            *("train.eval_every", "0", {}),
        ),
        ("{on_bad_row: skip, max_bad_rows: 3}", "data.on_bad_row", "fail", {}),
        (
            "{lr_schedule: wsd, min_lr_ratio: 0.1, decay_ratio: 0.2}",
            *("optim.lr_schedule", "linear", {}),
        ),
        (
            "{lr_schedule: wsd, min_lr_ratio: 0.1, decay_ratio: 0.2}",
            *("optim.lr_schedule", "cosine"),
            {"lr_schedule": "cosine", "min_lr_ratio": 0.1},
        ),
        ("{adam_b1: 0.8}", "optim.optimizer", "lion", {"optimizer": "lion"}),
        (
            "{loraplus_lr_ratio: 4, loraplus_lr_embedding: 0.1}",
            *("optim.loraplus_lr_ratio", "null", {}),
        ),
    ],
)
def test_a_flag_drops_what_has_no_effect_beside_it(config, text, flag, value, expected):
    group = flag.partition(".")[0]
    text = f"{group}: {text}" if text[0] in "{a" else f"{group}.{text}"
    words = [f"--{flag}", value] if value else [f"--{flag}="]
    assert changed(config, group, text, *words) == expected


def test_a_greedy_choice_drops_what_the_file_says_of_drawing(config):
    file = config("{temperature: 0.5, top_p: 0.9, top_k: 3, seed: 2}")
    words = ["--config", file, "--temperature", "0"]
    assert parse(TextConfig, words) == TextConfig(seed=2)


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("seed: 1", ["--mesh", "auto", "--mesh.data", "1"], "mesh.auto chooses"),
        ("mesh: {auto: true, data: 1}", [], "mesh.auto chooses"),
        ("train: {max_steps: 2, num_epochs: 3}", [], "num_epochs=3.0 has no effect"),
        ("train.keep_best: true", [], "keep_best has no effect"),
        ("optim.min_lr_ratio: 0.1", [], "min_lr_ratio has no effect"),
        (
            "optim.lr_schedule: cosine",
            ["--optim.lr_schedule", "linear", "--optim.min_lr_ratio", "0.1"],
            "min_lr_ratio has no effect",
        ),
    ],
)
def test_two_values_of_one_source_are_refused_as_before(config, text, words, said):
    given = ["--model", "m", "--output_dir", "o", "--config", config(text), *words]
    assert said in message(*given, cls=train.Arguments)


@dataclass(frozen=True)
class Shown:
    """Show a file."""

    group_: dict[str, float] | str
    """File."""
    group: Group = field(default_factory=Group)


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("group: a", "a"),
        ("group: {a: 2}", {"a": 2.0}),
        ("group.rank: 3\ngroup: a", "a"),
    ],
)
def test_a_flag_may_have_the_name_of_a_group(text, file, config):
    rank = 3 if "rank" in text else 8
    assert parse(Shown, ["--config", config(text)]) == Shown(file, Group(rank=rank))
    words = ["--group", "a", "--group.rank", "2"]
    assert parse(Shown, words) == Shown("a", Group(rank=2))
    said = message("--config", config("group: {rank: 2}"), cls=Shown)
    assert said == "missing: --group (File); --help lists all"
