"""The address space of this process where `ulimit -v` bounds it, and errors that tell of a want of it.

Imports nothing that is slow or takes memory.
"""

import re
import resource

# What libraries call it that have no MemoryError.
SCARCE = re.compile(
    r"memory|alloc|failed to map segment|start new thread|resource temporarily unavailable|mmap|bad array new length|"
    r"serialize proto|Load model from",
    re.IGNORECASE,
)


def address_limit() -> int | None:
    """Return the bytes that `ulimit -v` allows; None for any number."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def is_scarcity(error: BaseException | None) -> bool:
    """Tell whether an error, or what it came from, is a want of memory."""
    while error is not None:
        said = (isinstance(error, OSError) and error.strerror) or str(error)  # without the names of files
        if isinstance(error, MemoryError) or SCARCE.search(said):
            return True
        error = error.__cause__ or error.__context__
    return False


def said_scarcity(limit: int) -> str:
    """Say that so many bytes of address space are too little, and what mends it."""
    return f"too little memory: ulimit -v allows {limit >> 20} MB; allow more: ulimit -v unlimited"
