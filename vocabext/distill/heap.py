"""Memory that is freed and still held.

The C library gives large blocks back when they are freed, and keeps small ones for later. What is small it decides
anew with each block that is freed, up to 32 MiB: nearly every tensor of a step. Between tensors that stay, a good part
of that fits nothing that comes after, and the process grows a third beyond what is in use.
"""

import ctypes
import sys

M_MMAP_THRESHOLD = -3  # malloc.h
LARGE_BYTES = 256 * 1024


def give_back_large_blocks() -> None:
    """Let glibc call the same blocks large for as long as the process lives."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
