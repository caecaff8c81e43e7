"""Writes tests/golden/sampling: probabilities after each of Transformers' processors.

Run once, with torch and transformers installed:
    python tests/golden/make_sampling_golden.py

expected.npz holds the logits [B, V], which tokens occurred, and for each case of
`helpers.sampling_cases` the probabilities after every processor that it uses.
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path += [str(HERE.parent), str(HERE.parent.parent)]

from helpers.sampling_cases import CASES, logits_and_texts  # noqa: E402
from parity.processors import probabilities_of_transformers  # noqa: E402


def main() -> None:
    logits, texts = logits_and_texts()
    arrays = {"logits": logits, "texts": texts}
    for name, case in CASES.items():
        for step, found in probabilities_of_transformers(logits, texts, case).items():
            arrays[f"{name}.{step}"] = found
    np.savez_compressed(HERE / "sampling" / "expected.npz", **arrays)


if __name__ == "__main__":
    main()
