"""The tokenizers of Transformers 4, which needs an older huggingface_hub than jlora.

Run as a script by the Python of an environment that has it; imported, it starts that Python.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PYTHON = Path(__file__).parents[2] / ".venv-transformers4" / "bin" / "python"


class AutoTokenizer:
    """Answers as Transformers' class does, from another process."""

    _process: subprocess.Popen[str] | None = None

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def from_pretrained(cls, folder: Path) -> "AutoTokenizer":
        return cls(folder)

    def __call__(self, text: str, **options: Any) -> Any:
        return self._ask(["__call__", [text], options])

    def apply_chat_template(self, *arguments: Any, **options: Any) -> Any:
        return self._ask(["apply_chat_template", arguments, options])

    def __getattr__(self, name: str) -> Any:
        return self._ask([name, None, None])

    def _ask(self, request: list[Any]) -> Any:
        process = AutoTokenizer._process
        if process is None or process.poll() is not None:
            process = AutoTokenizer._process = subprocess.Popen(
                [PYTHON, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([str(self.folder), *request]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())


def main() -> None:
    """Answers one request after the other."""
    import transformers

    assert transformers.__version__.startswith("4."), transformers.__version__
    for line in sys.stdin:
        folder, name, arguments, options = json.loads(line)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        found = getattr(tokenizer, name)
        found = found if arguments is None else found(*arguments, **options)
        print(json.dumps(dict(found) if hasattr(found, "keys") else found), flush=True)


if __name__ == "__main__":
    main()
