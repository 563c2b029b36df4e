"""How far bounds of scores are above them, for q and k made by hand."""

import math

import pytest
import torch

from dit_sparse.grid import TokenGrid, TokenLayout
from scripts.evaluation.bounds import measure, table
from scripts.evaluation.probe import Capture

LAYOUT = TokenLayout.of(TokenGrid(1, 16, 16))


def capture_of(length: float, cosine: float) -> Capture:
    """All queries alike and all keys alike, of this length and with this cosine between them."""
    q, k = torch.zeros(2, 1, LAYOUT.length, 64)
    q[..., 0] = length
    k[..., 0], k[..., 1] = length * cosine, length * math.sqrt(1 - cosine**2)
    return Capture(0, 3, LAYOUT, q, k, torch.zeros_like(q))


@pytest.mark.parametrize("cosine", [1.0, 0.5, -1.0])
def test_bits_between_bound_and_log_sum_exp(cosine: float):
    row = next(iter(measure([capture_of(8.0, cosine)])))
    # Scores are 8 * cosine, their bound is 8, and 256 equal weights add 8 powers of 2.
    expected = 8.0 * (1 - cosine) / math.log(2) - 8
    assert row["median_bits"] == pytest.approx(expected, abs=1e-3)
    assert row["most_bits"] == pytest.approx(expected, abs=1e-3)
    assert (row["rows"], row["computed_again"]) == (256, 0)


def test_rows_that_are_computed_again():
    assert all(row["computed_again"] == 0 for row in measure([capture_of(15.0, -1.0)]))
    rows = list(measure([capture_of(17.0, -1.0)]))  # 2 * 17 * 17 / 8 = 72 nats, 96 bits and more
    assert [row["computed_again"] for row in rows] == [256] * 3
    assert "100.00%" in table(rows)
