"""The C library's heap, where it is glibc: kept between photos on a CPU, given back after huge ones."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_KEPT_BYTES, _GROWTH_BYTES = 2**30, 2**26


def keep_heap() -> None:
    """Let the C library keep freed memory of the transforms for the next ones, where it is glibc.

    torch has no cache for the CPU: by default each large activation is mapped anew, and the kernel then spends more
    time on clearing pages than the convolutions need (12 megapixels: 9.7 s, with this 3.0 s). One arena, nothing
    mapped, up to a gigabyte kept.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TOP_PAD, _GROWTH_BYTES), (_M_TRIM_THRESHOLD, _KEPT_BYTES))
        for parameter, value in settings:
            mallopt(parameter, value)


def release_heap() -> None:
    """Give freed memory back to the system, after work that took much more than usual."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(_GROWTH_BYTES)
