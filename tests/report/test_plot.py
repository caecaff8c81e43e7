import os

import pytest

from jlora.report.plot import plot_run
from jlora.report.run_report import Report


def test_the_plot_is_a_png(tmp_path):
    with Report(tmp_path, total_steps=9) as report:
        for step in (1, 2):
            report.log(step=step, loss=2.0, learning_rate=1e-4)
        report.log_evaluation(2, 1.5, is_best=True)
    target = plot_run(tmp_path)
    assert target == tmp_path / "report.png"
    assert target is not None
    assert target.read_bytes().startswith(b"\x89PNG")


def test_nothing_logged_is_no_plot(tmp_path):
    assert plot_run(tmp_path) is None
    assert not (tmp_path / "report.png").exists()


@pytest.mark.parametrize(
    "name", ["a$b$", r"$\\frac{", "$x$ \n \t", "雪", os.fsdecode(b"\xff")]
)
def test_the_title_is_the_name_of_the_folder_as_it_is(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    with Report(folder, total_steps=9) as report:
        report.log(step=1, loss=2.0, learning_rate=1e-4)
    assert plot_run(folder) is not None
