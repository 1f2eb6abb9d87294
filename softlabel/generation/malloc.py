"""Keep freed memory in labelling processes instead of returning it to the system after each batch.

glibc maps every block above a threshold, zeroed page by page, and normally raises the threshold dynamically. Setting
any of its limits disables this: Dask's nanny sets MALLOC_TRIM_THRESHOLD_, so every tensor above 128 KiB is mapped and
unmapped, which doubles the CPU time of small images. See mallopt(3), M_MMAP_THRESHOLD.
"""

import ctypes

# Parameters of mallopt(3), set to values that plain processes reach: glibc's maximum for blocks from the heap; padding,
# so that heaps that are briefly empty are not unmapped; free memory kept at the end of the heap.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LIMITS = {_M_MMAP_THRESHOLD: 32 << 20, _M_TOP_PAD: 64 << 20, _M_TRIM_THRESHOLD: 256 << 20}


def keep_freed_memory() -> None:
    """Let this process keep up to about 256 MB of freed memory, with glibc; only for processes of our own."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name, value in _LIMITS.items():
            mallopt(name, value)
