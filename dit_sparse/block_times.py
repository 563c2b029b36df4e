"""How long blocks take on a GPU: for choosing tiles and windows before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

from dit_sparse.mask_product import COLUMNS

# Microseconds on one multiprocessor of an H200, head dim 128, 16 bit, the kernel in Gluon: least
# squares over the rows of `benchmarks/kernels.jsonl`, all within 9 %
# (`scripts/fit_block_times.py`). Head dim 64 takes 1.03, 1.12 and 1.55 for all but the product, so
# that its best tiles are nearly the same.
WHOLE = 1.45  # an entry, where all key blocks hold as many tokens as they may
SHORT = 1.56  # an entry, where some hold fewer, whose ends are hidden
ROW = 2.43  # to begin and end a query block
# The product that masks is one matrix instruction beside sixteen (head dim 64: beside eight), in
# entries that hide a key. It hides the ends of short blocks too, so that the difference above and
# this one are counted twice.
PRODUCT = 0.2
# Whether any GPU masks by that product, by the table in `kernels/variants.json`.
BY_PRODUCT = True
# What the portable kernel takes for masked entries where no product masks: queries of a block are
# of too many classes, or the table does not choose it.
MASKED = 3.5  # an entry
MASKED_ROW = 9.0  # to take up a query block again in that second launch


@dataclass(frozen=True)
class Work:
    """What one head of a plan has to compute.

    Args:
        rows: query blocks.
        full: entries without a mask.
        partial: entries masked by coordinates.
        masked_rows: query blocks with any of those.
        whole: whether all key blocks hold as many tokens as they may.
        classes: of the queries of a block, summed over the axes; see `dit_sparse.mask_product`.
    """

    rows: int
    full: int
    partial: int = 0
    masked_rows: int = 0
    whole: bool = True
    classes: int = 0

    @property
    def time(self) -> float:
        """Microseconds of one multiprocessor; heads and rows share as many as there are."""
        entry, entries = WHOLE if self.whole else SHORT, self.full + self.partial
        if not self.partial:
            return entries * entry + self.rows * ROW
        if BY_PRODUCT and self.classes < COLUMNS:
            return entries * entry + self.partial * PRODUCT + self.rows * ROW
        again = self.partial * MASKED + self.masked_rows * MASKED_ROW
        return self.full * entry + self.rows * ROW + again
