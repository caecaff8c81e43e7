"""Compiled programs kept between runs, so that a later start does not compile again."""

import os
from pathlib import Path
from typing import Any

import jax

_SETTINGS = {
    # With a limit, JAX also takes a lock, so that no process reads half a file. The
    # programs used least recently go first.
    "jax_compilation_cache_max_size": 4 * 2**30,
    # JAX's own threshold of a second leaves out dozens of small ones that add up. Without
    # any, files would: every write looks at all of them.
    "jax_persistent_cache_min_compile_time_secs": 0.03,
}


def keep_compiled() -> None:
    """Makes JAX keep its programs in the user's cache folder, if it has no other.

    A later run of the same program then takes the same machine code. A folder that
    others can write to is left alone, because what lies there is run; nothing is kept
    where there is none to write to. Nor by several processes, unless they were told a
    folder that they share: compiling takes them all, and only the first one writes.
    """
    config: Any = jax.config  # also set by JAX_COMPILATION_CACHE_DIR
    if config.jax_compilation_cache_dir or jax.process_count() > 1:
        return
    folder = _own_folder()
    if folder is None:
        return
    for name, value in _SETTINGS.items():
        if name.upper() not in os.environ:
            config.update(name, value)
    config.update("jax_compilation_cache_dir", str(folder))


def _own_folder() -> Path | None:
    """Returns $XDG_CACHE_HOME/jlora/compiled, made if need be, or None if it cannot serve."""
    try:
        above = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(above) / "jlora" / "compiled"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    private = facts.st_uid == os.getuid() and not facts.st_mode & 0o022
    return folder if private and os.access(folder, os.W_OK) else None
