import pytest
from helpers.commands import call, succeed, train_flags
from helpers.data_cases import write_rows

pytestmark = pytest.mark.usefixtures("in_workdir")


def test_plan_reads_no_weights_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("jlora.loading.load_params", pytest.fail)
    out = succeed("train", *train_flags(tmp_path / "run", "--plan", "--mesh.data", 1))
    assert out.startswith("trainable params: 7,424")
    for text in (
        "activations",
        "tokens per record",
        "What is a?{+ It is a.[[<|im_end|>]]+}",
    ):
        assert text in out
    assert not (tmp_path / "run").exists()


def test_plan_continues_an_adapter(run, tmp_path):
    flags = train_flags(tmp_path / "new", "--plan", "--init_adapter", run)
    assert succeed("train", *flags).startswith("trainable params: 7,424")


def test_without_a_length_packed_rows_are_as_long_as_the_model_allows(tmp_path):
    flags = [str(flag) for flag in train_flags(tmp_path / "run")]
    at = flags.index("--data.seq_len")
    del flags[at : at + 2]
    assert " x 128 tokens" in succeed("train", *flags, "--plan", "--data.packing")


def test_without_a_length_a_record_is_cut_where_the_model_ends(tmp_path):
    write_rows(tmp_path / "long.jsonl", [{"text": "What is a? " * 100}] * 8)
    flags = [
        *("--model", "hf", "--output_dir", tmp_path / "run", "--plan"),
        *("--data.train", tmp_path / "long.jsonl"),
    ]
    assert " x 128 tokens" in succeed("train", *flags)


def test_a_plan_says_whether_it_fits_and_what_would_help(tmp_path):
    one = ("--plan", "--mesh.data", 1)
    fits = succeed("train", *train_flags(tmp_path / "run", *one))
    assert "GiB: fits\n" in fits
    assert "to make it fit" not in fits
    rows = ("--train.batch_size", 8 * 10**7)
    advice = succeed("train", *train_flags(tmp_path / "run", *one, *rows))
    assert "GiB: does not fit\n  to make it fit: fewer rows" in advice
    for useless in ("remat", "devices", "nf4"):  # on a CPU
        assert useless not in advice.partition("to make it fit")[2].splitlines()[0]


def test_several_devices_of_a_cpu_are_not_estimated(tmp_path):
    out = succeed("train", *train_flags(tmp_path / "run", "--plan", "--mesh.data", 2))
    assert "memory: not estimated on a CPU" in out


def test_a_plan_for_a_gpu_that_is_not_there(tmp_path):
    flags = train_flags(tmp_path / "run", "--plan", "--device", "h100:2")
    out = succeed("train", *flags)
    assert "on 2 H100: bfloat16, attention cudnn, kernels xla, remat none" in out
    for text in ("of 75.62 GiB: fits", "tokens/s", "largest that fits", "mesh: data=2"):
        assert text in out
    assert "--mesh auto chooses this mesh" in out


def test_a_plan_for_a_slice_that_is_not_there(tmp_path):
    flags = train_flags(tmp_path / "run", "--plan", "--device", "v5e:2x2")
    out = succeed("train", *flags, "--train.batch_size", 4, "--mesh.fsdp", 4)
    assert "on 4 TPU v5 lite: bfloat16, attention splash" in out
    assert "of 16.00 GiB: fits" in out
    assert "an expectation" in out
    assert "each device receives" in out


def test_a_device_is_for_plans_and_has_to_be_known(tmp_path):
    done = call("train", *train_flags(tmp_path / "run", "--device", "h100"))
    assert done.status == 2
    assert "no effect without --plan" in done.err
    done = call("train", *train_flags(tmp_path / "run", "--plan", "--device", "h10"))
    assert done.status == 2
    assert "did you mean 'h100'" in done.err


def test_a_run_on_the_mesh_that_auto_chooses(tmp_path):
    flags = train_flags(tmp_path / "run", "--mesh", "auto", "--train.batch_size", 8)
    out = succeed("train", *flags, "--train.max_steps", 1)
    assert "mesh: data=8\n" in out
    config = tmp_path / "run" / "config.yaml"
    again = succeed(
        "train", "--config", config, "--output_dir", tmp_path / "x", "--plan"
    )
    assert "mesh: data=8\n" in again


def test_auto_and_sizes_of_a_mesh_contradict(tmp_path):
    flags = train_flags(tmp_path / "run", "--mesh", "auto", "--mesh.fsdp", 2)
    assert "mesh.auto chooses all sizes" in call("train", *flags).err


def test_held_out_rows_that_the_mesh_does_not_divide_are_refused_at_once(tmp_path):
    long = write_rows(tmp_path / "long.jsonl", [{"text": "What is a? " * 100}] * 8)
    flags = train_flags(tmp_path / "run", "--plan", "--mesh.context", 4)
    flags += ["--mesh.data", 1, "--data.eval", long, "--data.seq_len", 66]
    done = call("train", *flags)
    assert done.status == 2
    assert "mesh.context=4 does not divide rows of 66 tokens" in done.err
