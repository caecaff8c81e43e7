"""Live comparison with Transformers and PEFT; `make parity` gives it its environment."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Theirs to mend: what Transformers, PEFT and torch say of their own code.
THEIR_WARNINGS = [
    "ignore:::transformers",
    "ignore:::peft",
    "ignore:::torch",
]


def pytest_configure(config):
    for line in THEIR_WARNINGS:
        config.addinivalue_line("filterwarnings", line)
