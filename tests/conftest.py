"""Runs every test on eight simulated CPU devices; holds the fixtures that files share."""

import os

# Read once, when JAX starts its backend: before any test imports the library.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Two cores gain nothing from optimising the code of a tiny model for long.
        "--xla_backend_optimization_level=0",
    ]
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
