"""examples/finetune.ipynb is run in a kernel, and a kernel that trains is interrupted."""

import asyncio
from pathlib import Path
from typing import Any

import nbformat
import pytest
from helpers import ROOT
from helpers.commands import make_model, metrics
from nbclient import NotebookClient
from nbclient.util import ensure_async

FILE = ROOT / "examples" / "finetune.ipynb"
LONG = """
import jlora
fitted = jlora.fit("hf", "data/chat.jsonl", "long", seq_len=256, max_steps=10**6)
print(fitted.is_finished, len(fitted.metrics))
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("notebook")
    make_model(folder / "hf", num_hidden_layers=1, max_position_embeddings=1024)
    (folder / "data").symlink_to(ROOT / "examples" / "data")
    return folder


@pytest.fixture(autouse=True)
def library(monkeypatch, tmp_path):
    """What a kernel imports, and where it keeps files of its own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))


def client_of(notebook: Any, workdir: Path) -> NotebookClient:
    resources = {"metadata": {"path": str(workdir)}}
    return NotebookClient(notebook, timeout=300, resources=resources)


def printed(cell: Any) -> str:
    return "".join(out.text for out in cell.outputs if out.output_type == "stream")


def test_the_notebook_trains_and_tells_how(workdir):
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [(cell.outputs, cell.execution_count) for cell in cells] == [
        ([], None) for _ in cells
    ]
    assert cells[0].metadata.tags == ["parameters"]
    cells[0].source = 'MODEL = "hf"\nRUN = "run"'
    client_of(notebook, workdir).execute()
    display, shown = cells[3].outputs[-1], printed(cells[3])
    assert display.data["text/plain"] == "<Fitted in run: finished at step 6>"
    bars = [out for out in cells[3].outputs if out.output_type == "display_data"]
    assert ["6/6" in out.data["text/plain"] for out in bars] == [True]
    assert "trainable params: " in shown
    assert "eval_loss" in shown
    assert "step 3/6  loss" not in shown  # only the bar has it
    losses = [line["loss"] for line in metrics(workdir / "run") if "loss" in line]
    assert losses[-1] < losses[0]
    assert printed(cells[5]) > "\n"
    assert printed(cells[4]).endswith(printed(cells[5]))


def test_interrupting_the_kernel_saves_and_returns(workdir):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(LONG)])
    client = client_of(notebook, workdir)

    async def run() -> None:
        task = asyncio.ensure_future(client.async_execute())
        while not task.done() and not (workdir / "long/metrics.jsonl").exists():
            await asyncio.sleep(0.2)
        while not task.done() and not metrics(workdir / "long"):
            await asyncio.sleep(0.2)
        assert client.km is not None
        await ensure_async(client.km.interrupt_kernel())
        await task

    asyncio.run(run())
    words = printed(notebook.cells[0]).split()
    steps = int(words[-1])
    assert words[-2:] == ["False", str(len(metrics(workdir / "long")))]
    saved = {int(path.name) for path in (workdir / "long" / "checkpoints").iterdir()}
    assert max(saved) == steps
