"""How long blocks take on a GPU: for choosing tiles and windows before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

# Microseconds on one multiprocessor of an H200, head dim 128, 16 bit, the specialised kernel: a
# least-squares fit to the rows of `benchmarks/kernels.jsonl`, all within 5 %. Head dim 64 takes
# 1.17, 1.34 and 4.8 for the first three, so that its best tiles are nearly the same.
WHOLE = 1.64  # an entry, where all key blocks hold as many tokens as they may
SHORT = 1.87  # an entry, where some hold fewer, whose ends are hidden
ROW = 3.2  # to begin and end a query block
# From a single row of that file, with few masked entries, and from the instructions of a mask.
MASKED = 2.6  # an entry masked by coordinates
MASKED_ROW = 9.0  # to take up a query block again in the second launch, which these run in


@dataclass(frozen=True)
class Work:
    """What one head of a plan has to compute.

    Args:
        rows: query blocks.
        full: entries without a mask.
        partial: entries masked by coordinates.
        masked_rows: query blocks with any of those.
        whole: whether all key blocks hold as many tokens as they may.
    """

    rows: int
    full: int
    partial: int = 0
    masked_rows: int = 0
    whole: bool = True

    @property
    def time(self) -> float:
        """Microseconds of one multiprocessor; heads and rows share as many as there are."""
        entries = self.full * (WHOLE if self.whole else SHORT) + self.partial * MASKED
        return entries + self.rows * ROW + self.masked_rows * MASKED_ROW
