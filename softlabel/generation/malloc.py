"""Keep freed memory in a process that labels batch after batch, where the C library would give each back to the system.

glibc maps every block above a threshold anew, zeroed page by page, and raises the threshold by itself when such blocks
come and go. Setting any of its limits freezes all of them where they are: Dask's nanny sets MALLOC_TRIM_THRESHOLD_, and
whatever its value, every tensor above 128 KiB is mapped, faulted in and unmapped again, which doubles the CPU time of
small images. See mallopt(3), M_MMAP_THRESHOLD.
"""

import ctypes

# Parameters of mallopt(3) and what plain processes reach by themselves: the most that glibc allows for the first, so
# that activations come from the heap; room on top of a heap, so that a thread's heaps are not unmapped when they are
# empty for a moment; and how much may lie free at the end of the heap.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LIMITS = {_M_MMAP_THRESHOLD: 32 << 20, _M_TOP_PAD: 64 << 20, _M_TRIM_THRESHOLD: 256 << 20}


def keep_freed_memory() -> None:
    """Let this process keep what it frees, up to about 256 MB; nothing where the C library is not glibc.

    For processes that do nothing but label: what a program of somebody else's keeps is not ours to say.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name, value in _LIMITS.items():
            mallopt(name, value)
