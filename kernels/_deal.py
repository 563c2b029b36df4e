"""Tiles of a queue, each to the program that has least so far. Launched by `dealt.py`."""

import triton
import triton.language as tl

#: A program in 64 bits: what it has, behind its number and its turn; above all that, whether it
#: takes no more.
_LOAD = tl.constexpr(30)
_NUMBER = tl.constexpr(22)
_NUMBERS = tl.constexpr(0xFF)
_TURNS = tl.constexpr((1 << 22) - 1)
_OUT = tl.constexpr(1 << 62)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit(do_not_specialize=["n_tiles", "most"])  # compiled once for all of them
def _deal_fwd(
    queue_ptr, entries_ptr, tiles_ptr, turns_ptr, n_tiles, n_programs, most,
    START: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program deals, in rounds. Those of whom each has less than all before it will have take
    the next tiles together: the same as one after the other."""
    rank = tl.arange(0, WIDTH)
    programs = (rank << _NUMBER).to(tl.int64)
    programs = tl.where(rank < n_programs, programs, programs | _OUT)
    at = 0
    while at < n_tiles:
        left = at + rank < n_tiles
        tile = tl.load(queue_ptr + at + rank, mask=left, other=0)
        worth = tl.load(entries_ptr + at + rank, mask=left, other=0) + START
        programs = tl.sort(programs)
        after = programs + (worth.to(tl.int64) << _LOAD) + 1
        # Who has least always takes one. Behind one that does not, none does.
        takes = left & (programs < tl.associative_scan(after, 0, _smaller))
        turn = (programs & _TURNS).to(tl.int32)
        number = ((programs >> _NUMBER) & _NUMBERS).to(tl.int32)
        tl.store(tiles_ptr + turn * n_programs + number, tile, mask=takes)
        after = tl.where(turn + 1 < most, after, after | _OUT)
        programs = tl.where(takes, after, programs)
        at += tl.sum(takes.to(tl.int32), 0)
    number = ((programs >> _NUMBER) & _NUMBERS).to(tl.int32)
    tl.store(turns_ptr + number, (programs & _TURNS).to(tl.int32), mask=number < n_programs)
