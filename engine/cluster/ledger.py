"""How often calls were begun: all that its process imports, since Ray starts one for each run."""

from collections import Counter


class Ledger:
    """Counts how often calls were begun, in a process of its own, since workers may die of them.

    Ray asks a worker again without end, also while its machine is gone and nobody has noticed.
    """

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, call: str) -> int:
        self._begun[call] += 1
        return self._begun[call]
