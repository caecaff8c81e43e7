"""Settings of JAX and malloc: a GPU's memory, and faster starts and steps on a CPU."""

import ctypes
import os
import platform
from pathlib import Path
from typing import Any

_CACHE_SETTINGS = {
    # A limit also makes JAX take a lock, so that no process reads half a file. The
    # programs used least recently are deleted first.
    "jax_compilation_cache_max_size": 4 * 2**30,
    # JAX's own threshold of a second skips dozens of small programs that add up. No
    # threshold at all would write too many files: every write looks at all of them.
    "jax_persistent_cache_min_compile_time_secs": 0.03,
}
# Of a GPU's memory, for JAX's programs. The rest is the driver's, cuDNN's and NCCL's.
GPU_MEMORY_SHARE = 0.95
_SHARE_NAMES = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def take_gpu_memory() -> None:
    """Lets JAX use most of a GPU's memory; by default it leaves a quarter unused.

    Call it before JAX looks for devices. A share that the user has set stays.
    """
    if not any(name in os.environ for name in _SHARE_NAMES):  # both at once are refused
        os.environ[_SHARE_NAMES[0]] = str(GPU_MEMORY_SHARE)


def keep_compiled() -> None:
    """Makes JAX keep compiled programs in the user's cache folder, for later runs.

    A cache that the user has configured stays. A folder that others can write to is not
    used, because programs in it are executed. Several processes keep nothing, unless
    the user gave them a shared folder: only the first would write.
    """
    import jax  # not before the flags are checked

    config: Any = jax.config  # also set by JAX_COMPILATION_CACHE_DIR
    if config.jax_compilation_cache_dir or jax.process_count() > 1:
        return
    folder = _private_folder()
    if folder is None:
        return
    for name, value in _CACHE_SETTINGS.items():
        if name.upper() not in os.environ:
            config.update(name, value)
    config.update("jax_compilation_cache_dir", str(folder))


def _private_folder() -> Path | None:
    """Returns $XDG_CACHE_HOME/jlora/compiled, or None if it cannot be made or trusted."""
    try:
        above = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(above) / "jlora" / "compiled"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    private = facts.st_uid == os.getuid() and not facts.st_mode & 0o022
    return folder if private and os.access(folder, os.W_OK) else None


def keep_freed_memory() -> None:
    """Makes steps on a CPU reuse memory; call it before any use of a device.

    A step's temporaries are one large block. glibc would return it to the system after
    every step, which then clears it page by page: a fifth of a small model's step. With
    this, a process stays as large as its largest step.

    Only the main thread's heap can grow to any size, so computations run in their
    caller's thread; by default JAX runs them in its own. (Joined processes have their
    devices already and stay with JAX's thread.) Another malloc than glibc's is left alone.
    """
    import jax

    config: Any = jax.config
    config.update("jax_cpu_enable_async_dispatch", False)
    if platform.libc_ver()[0] == "glibc" and jax.default_backend() == "cpu":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
