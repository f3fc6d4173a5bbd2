"""What is known of a GPU without asking its libraries again."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """What launches are cut for."""

    compute_capability: str  # as in 8.9
    multiprocessors: int
    cache_bytes: int  # L2
    shared_bytes: int  # of a multiprocessor
