"""What several test files share; imported as `helpers.NAME` everywhere."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
