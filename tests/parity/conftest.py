"""Live comparison with Transformers and PEFT; `make parity` gives it its environment."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Of two flags the later one holds: parity is shown for the programs that users run.
os.environ["XLA_FLAGS"] += (
    " --xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true"
)
# Theirs to mend: what Transformers, PEFT and torch say of their own code.
THEIR_WARNINGS = [
    "ignore:::transformers",
    "ignore:::peft",
    "ignore:::torch",
]


def pytest_configure(config):
    for line in THEIR_WARNINGS:
        config.addinivalue_line("filterwarnings", line)
