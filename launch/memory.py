"""One setting of the C library's allocator that CPU training gains much by."""

import ctypes

# options of mallopt (glibc's malloc.h) and the values that keep freed memory in the process
_KEEP = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}


def keep_memory() -> bool:
    """Let the process keep memory that it frees; whether the C library knows how (glibc does).

    XLA:CPU allocates a program's buffers at every call: 0.7 GB for a training step of a U-Net of
    7.7 M parameters at 32 px. By default glibc returns them to the system afterwards, and the next
    step pays a page fault for every 4 kB again: 2.6 s a step instead of 1.55 s on one core (the
    case "cifar32" of launch/bench.py). There is a single arena, because threads' own ones map large
    blocks anew. Call it before threads start. The process stays as large as it ever was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(option, value) for option, value in _KEEP.values()])
