import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from jlora.report.run_report import Report


@pytest.fixture
def shown(monkeypatch) -> list[Any]:
    """What a display shows, in a program that looks like a notebook's kernel."""
    texts: list[Any] = []

    def display(data: dict[str, str], **_: Any) -> Any:
        texts.append(data["text/plain"])
        return SimpleNamespace(
            update=lambda data, raw: texts.append(data["text/plain"])
        )

    module: Any = ModuleType("IPython")
    module.get_ipython = lambda: SimpleNamespace(kernel=True)
    module.display = SimpleNamespace(display=display)
    monkeypatch.setitem(sys.modules, "IPython", module)
    return texts


def test_a_notebook_shows_one_display_and_lines_that_stay(shown, tmp_path, capsys):
    with Report(tmp_path, total_steps=40) as report:
        for step in (1, 2, 30):
            report.log(step=step, loss=1.5, learning_rate=1e-3)
        report.log_evaluation(30, 1.25, is_best=True)
    assert "0/40" in shown[0]
    assert "30/40" in shown[-1]
    assert "loss 1.5000  lr 1.00e-03" in shown[-1]
    assert len(shown) == 3  # those in between came too soon
    assert capsys.readouterr().out == "step 30/40  eval_loss 1.2500  best so far\n"
