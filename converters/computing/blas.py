"""Makes numpy's matrix products,
of OpenBLAS as numpy ships it, give the same bits every time.

A product of two small matrices may round otherwise with another kernel, and some kernels
round otherwise where the work is cut for threads. With one thread and kernels for
AVX-512 every element is a chain of fused multiply-adds in order, which is what torch
(MKL) computes too for up to 128 terms. Kernels for AVX2 differ from it in the last bit
of some elements. Seen with OpenBLAS 0.3.31 and torch 2.13.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

_PREFIXES = ("scipy_openblas", "openblas")
_SUFFIXES = ("64_", "")
_AVX512_FLAGS = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}  # of SkylakeX' kernels
_MAX_CPUINFO_BYTES = 1 << 16  # bytes of /proc/cpuinfo that hold the first processor's flags
_lock = Lock()
_users = 0
_previous_counts: list[tuple[Callable[[int], None], int]] = []


def prefer() -> None:
    """Loads numpy so that its products are those of torch where the processor can.

    Without effect where numpy is loaded already, or the user chose a kernel.
    """
    if "numpy" in sys.modules or "OPENBLAS_CORETYPE" in os.environ or not has_avx512():
        return

    os.environ["OPENBLAS_CORETYPE"] = "SkylakeX"  # read once, when the library is loaded
    try:
        import numpy  # noqa: F401
    finally:
        del os.environ["OPENBLAS_CORETYPE"]


def has_avx512() -> bool:
    """Whether the processor has what OpenBLAS' kernels for AVX-512 need (Linux)."""
    try:
        with open("/proc/cpuinfo", "rb") as file:
            head = file.read(_MAX_CPUINFO_BYTES).decode("ascii", "replace")
    except OSError:
        return False

    flags = next((line for line in head.splitlines() if line.startswith("flags")), "")
    return set(flags.split()) >= _AVX512_FLAGS


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps numpy's products on one thread in this block, whichever thread makes them."""
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            for get_threads, set_threads in _libraries():
                _previous_counts.append((set_threads, get_threads()))
                set_threads(1)

    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                for set_threads, count in _previous_counts:
                    set_threads(count)
                _previous_counts.clear()


def _libraries() -> Iterator[tuple[Callable[[], int], Callable[[int], None]]]:
    """The functions that get and set the threads of each OpenBLAS that is loaded."""
    for path in _loaded():
        with suppress(OSError):
            library = ctypes.CDLL(path)
            yield from _functions(library)


def _functions(library: Any) -> Iterator[tuple[Callable[[], int], Callable[[int], None]]]:
    for prefix in _PREFIXES:
        for suffix in _SUFFIXES:
            get_threads = getattr(library, f"{prefix}_get_num_threads{suffix}", None)
            set_threads = getattr(library, f"{prefix}_set_num_threads{suffix}", None)
            if get_threads is not None and set_threads is not None:
                yield get_threads, set_threads
                return


def _loaded() -> list[str]:
    try:
        lines = Path("/proc/self/maps").read_text("utf-8", "replace").splitlines()
    except OSError:
        return []

    paths = {line.split(maxsplit=5)[5] for line in lines if "openblas" in line}
    return sorted(path for path in paths if ".so" in path)
