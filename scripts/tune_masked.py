"""What `tune_kernels.py` tries on entries that are masked by coordinates.

They are masked by a product in the specialised kernel, or that kernel leaves them to the portable
one. What goes wrong in specialised loops goes wrong now and then: each variant is run many times on
memory full of NaN, and every result has to be the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dit_sparse.attention import attend
from dit_sparse.backend import AttentionOutput
from dit_sparse.bench import time_interleaved
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.kernels import hopper, hopper_gluon, norms, portable
from dit_sparse.kernels.architecture import architecture
from dit_sparse.kernels.permute import permute
from dit_sparse.kernels.tiles import Tile, choose_tile
from dit_sparse.kernels.variants import Kernel
from dit_sparse.method import CallContext
from dit_sparse.methods.window import WindowMethod
from dit_sparse.plan import BlockPlan

ERROR = 1e-2  # relative, of 16-bit products
HEADS = 24
RUNS = 50  # what goes wrong in one of ten is then seen 199 times of 200


@dataclass(frozen=True)
class Windows:
    """Windows of stride 1 around every query, and text, which reads and is read by everything.

    Args:
        grid: tokens along frames, height and width.
        text: tokens before and after.
        heads: how many.
        window: of all heads, or one for each.
        tile: what blocks are cut from.
        far: whether some rows have scores far below their bounds, which the repair is for.
    """

    grid: tuple[int, int, int]
    text: tuple[int, int]
    heads: int
    window: tuple[int, int, int] | tuple[tuple[int, int, int], ...]
    tile: tuple[int, int, int]
    far: bool = False

    def plan(self, device: str) -> BlockPlan:
        first, last = self.text
        layout = TokenLayout.of(TokenGrid(*self.grid), text_first=first, text_last=last)
        empty = torch.empty(1, self.heads, layout.length, 16, device=device)
        method = WindowMethod(window=self.window, stride=1, tile=self.tile)
        return method.plan(empty, empty, CallContext(layout))


_BY_HEAD = ((3, 7, 9), (5, 5, 5), (8, 11, 21))
#: By whether blocks are short; the last of them is timed.
WINDOWS = {
    False: (
        Windows((8, 16, 32), (128, 256), 3, _BY_HEAD, (4, 4, 8), far=True),
        Windows((1, 128, 128), (0, 512), HEADS, (1, 40, 40), (1, 8, 16)),
    ),
    True: (
        Windows((8, 14, 27), (77, 130), 3, _BY_HEAD, (4, 4, 8), far=True),
        Windows((1, 124, 125), (77, 435), HEADS, (1, 40, 40), (1, 8, 16)),
    ),
}


def problem(
    windows: Windows, dtype: str, head_dim: int, device: str = "cuda"
) -> tuple[list[torch.Tensor], BlockPlan]:
    """q, k and v, and a plan with masked entries."""
    plan = windows.plan(device)
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, windows.heads, plan.q_blocks.total, head_dim)
    made = [torch.randn(shape, generator=generator, device=device) for _ in range(3)]
    if windows.far:
        made[0][:, :, ::300] *= 100
    return [x.to(getattr(torch, dtype)) for x in made], plan


@dataclass(frozen=True)
class Way:
    """How whole entries are run.

    Args:
        kernel: `hopper_gluon` stands for `hopper` where it refuses.
        bound: subtract a bound of the scores instead of running maxima.
    """

    kernel: Kernel
    bound: bool

    def __str__(self) -> str:
        return f"{self.kernel}, {'bounds' if self.bound else 'running maxima'}"


def ways(q: torch.Tensor, plan: BlockPlan, *, product: bool) -> tuple[list[Way], Way]:
    """All that production may take for such problems, and the one that it takes for large ones."""
    chosen = hopper.chosen(q, plan.k_blocks)
    if chosen == "portable" and not product:
        return [Way("portable", False)], Way("portable", False)
    kernels: list[Kernel] = ["hopper"]
    if chosen == "hopper_gluon":
        kernels.append(chosen)
    bounds = (False, True) if q.dtype == torch.bfloat16 else (False,)
    found = [Way(kernel, bound) for kernel in kernels for bound in bounds]
    return found, found[-1]


def run(
    qkv: Sequence[torch.Tensor], plan: BlockPlan, way: Way, *, product: bool
) -> AttentionOutput | None:
    """A call as production makes it; `None` if the specialised kernel refuses the product."""
    q, scale = qkv[0], qkv[0].shape[-1] ** -0.5
    ordered = permute(qkv, plan.order) if plan.order is not None else list(qkv)
    result, lengths = room(q), None
    if way.bound:
        lengths = norms.empty(q)
        norms.measure(*ordered[:2], lengths)
    mask = hopper.mask_of(plan, scale) if product else None
    if product and mask is None:
        raise RuntimeError("Expected masks that are a product, got others. Try other windows.")
    done, given = None, (*ordered, plan, scale, result)
    if way.kernel == "hopper_gluon":
        done = hopper_gluon.launch(*given, mask=mask, lengths=lengths)
    if done is None and way.kernel != "portable":
        done = hopper.launch(*given, mask=mask, lengths=lengths)
    if done is None and mask is not None:
        return None
    tile = tile_for(q, boxed=True)
    for part in left(done is not None, mask is not None, way.bound):
        portable.launch(q, *ordered[1:], plan, scale, tile, result, part=part)
    return result


def left(specialised: bool, product: bool, bound: bool) -> list[portable.Part]:
    """What the portable kernel adds to the specialised one."""
    if not specialised:
        return ["all"]
    if product:
        return ["repair"] if bound else []
    return ["repair full", "partial"] if bound else ["partial"]


def room(q: torch.Tensor) -> AttentionOutput:
    lse = torch.full(q.shape[:3], float("nan"), device=q.device)
    return AttentionOutput(torch.full_like(q, float("nan")), lse)


def tile_for(q: torch.Tensor, *, boxed: bool) -> Tile:
    sizes = (q.shape[-1], q.element_size(), 128, 128)
    tile = choose_tile(architecture(q.device), *sizes, boxed=boxed)
    assert tile is not None, "every NVIDIA GPU has one"
    return tile


def poison(q: torch.Tensor) -> None:
    """Leaves NaN in the memory that tensors like q are made in next, and in shared memory."""
    for shape in (q.shape, (3, *q.shape), q.shape[:-1]):
        torch.full(shape, float("nan"), dtype=q.dtype, device=q.device)
    torch.full(q.shape[:-1], float("nan"), dtype=torch.float32, device=q.device)
    if q.is_cuda:
        full = torch.full((2048, 2048), float("nan"), dtype=q.dtype, device=q.device)
        full @ full


def fault(
    once: Callable[[], AttentionOutput | None], q: torch.Tensor, exact: AttentionOutput
) -> str | None:
    """What is wrong with a variant that is run `RUNS` times; `exact` is of the first heads."""
    first, broken, different = None, 0, 0
    for _ in range(RUNS):
        poison(q)
        if (found := once()) is None:
            return "the compile check refuses it"
        if not all(bool(x.isfinite().all()) for x in found):
            broken += 1
        elif first is None:
            first = found
        else:
            pairs = zip(found, first, strict=True)
            different += any(
                not torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs
            )
    if first is None or broken or different:
        return f"NaN in {broken} and a different result in {different} of {RUNS} runs"
    for x, y in zip(first, exact, strict=True):
        error = float((x[:, : y.shape[1]].double() - y).norm() / y.norm())
        if not error <= ERROR:
            return f"{error:.1e} from float64"
    return None


def measured(dtype: str, head_dim: int, *, product: bool, ragged: bool) -> float | str:
    """Milliseconds for the last of `WINDOWS`, or why the variant is refused.

    Args:
        dtype: name of a dtype of torch.
        head_dim: of q, k and v.
        product: whether entries are masked by a product; otherwise by the portable kernel.
        ragged: whether some blocks are short.
    """
    for windows in WINDOWS[ragged]:
        qkv, plan = problem(windows, dtype, head_dim)
        apart = plan.offsets.shape[1]  # heads that the plan tells apart
        exact = attend(*(x[:, :apart].double() for x in qkv), plan, backend="reference")
        tries, usual = ways(qkv[0], plan, product=product)
        for way in tries:
            if why := fault(partial(run, qkv, plan, way, product=product), qkv[0], exact):
                return f"{way}: {why}"
    it = partial(run, qkv, plan, usual, product=product)
    return round(time_interleaved({"it": it}, "cuda", rounds=9)["it"].median, 4)
