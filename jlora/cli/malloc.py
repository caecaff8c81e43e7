"""Memory that a step on a CPU frees, kept in the process for the next one."""

import ctypes
import platform
from typing import Any

import jax

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Makes steps on a CPU reuse memory; has to come before any use of a device.

    A step's temporaries are one large block. glibc would hand it back to the system after
    every step, which clears it anew in the next one, a page at a time: a fifth of a small
    model's step. Kept, a process stays as large as its largest step has been.

    Only the main thread's heap grows to any size, so computations are started in their
    caller's thread; else JAX starts them in one of its own, as it does where processes are
    joined: they have their devices before. Other memory than glibc's is left alone.
    """
    config: Any = jax.config
    config.update("jax_cpu_enable_async_dispatch", False)
    if platform.libc_ver()[0] == "glibc" and jax.default_backend() == "cpu":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
