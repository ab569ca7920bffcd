"""What makes training on a CPU about three times faster: the allocator, the compiler, bfloat16."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# A CPU with vectors of 512 bits, but not of bfloat16. torch.compile cannot trace the question.
_HAS = torch.cpu.get_capabilities()
SLOW_BFLOAT16 = bool(_HAS.get("avx512_f") and not (_HAS.get("avx512_bf16") or _HAS.get("amx_bf16")))

log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # <malloc.h> of the GNU C library


def keep_freed_memory() -> bool:
    """Tell the C library to keep freed memory instead of handing it back; returns whether it could.

    Every iteration frees and asks again for the same megabytes of activations. By default each of these goes
    to the kernel and comes back as pages that must be zeroed and faulted in, which takes as long as the
    arithmetic. The same as MALLOC_MMAP_MAX_=0, MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_ in the environment,
    but from inside the process.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library (musl) has other knobs
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
    return sum(bool(mallopt(key, value)) for key, value in settings) == len(settings)


def compiled(function: Callable[..., Any], wanted: bool) -> Callable[..., Any]:
    """`function` through torch.compile when that is wanted and a C++ compiler is there, else as it is."""
    if not wanted:
        return function
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        log.warning("no C++ compiler found: training without torch.compile, about twice as slow")
        return function
    faster: Callable[..., Any] = torch.compile(function, dynamic=False)
    return faster


@contextmanager
def private_compile_cache() -> Iterator[None]:
    """Let torch.compile keep its files in a folder of this process alone.

    A process that is killed while it compiles leaves half a library in the shared cache, and every later run
    would then fail on it. Compiling anew costs about a minute a stage.
    """
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(prefix="ddexport-compile-", ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def bfloat16(device: str = "cpu") -> torch.autocast:
    """bfloat16 products where torch deems them safe; weights, norms and losses stay float32.

    Where they would take three times as long, all is float32.
    """
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or not SLOW_BFLOAT16)
