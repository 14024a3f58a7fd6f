"""Imports of torch and transformers, which are the larger part of a short command."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collecting() -> Iterator[None]:
    """Do not look for garbage in the block, nor in a function that this decorates.

    An import makes hundreds of thousands of objects that stay. Looking through them again and again takes a sixth of
    the time of importing transformers. Nothing that makes much garbage may be done meanwhile.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
