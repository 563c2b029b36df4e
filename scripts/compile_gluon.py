"""The Hopper kernels in Gluon, compiled as their launchers would; for `compile_kernels.py`."""

from __future__ import annotations

from collections.abc import Iterator

import triton

from dit_sparse.kernels import hopper_gluon, pooled
from dit_sparse.mask_product import COLUMNS
from scripts.machine_code import K_BLOCK, Report, Variant, report_of, source_of


def in_gluon(every: bool) -> Iterator[Variant]:
    """The Hopper kernel in Gluon, where Triton is of the version that it was tried with."""
    if not triton.__version__.startswith(hopper_gluon.TRITON + "."):
        return
    for head_dim in (64, 128):
        for ragged in (False, True):
            for bound in (False, True):
                yield Variant("hopper_gluon", 90, head_dim, ragged, bound=bound)
                if every or bound == ragged:
                    yield Variant("hopper_gluon", 90, head_dim, ragged, bound=bound, queued=True)
        yield Variant("hopper_gluon", 90, head_dim, False, bound=True, order=False, grouped=True)
        for bound in (False, True):
            yield Variant("hopper_gluon", 90, head_dim, False, box=True, bound=bound)
            yield Variant("hopper_gluon", 90, head_dim, False, box=True, bound=bound, queued=True)
        yield Variant("hopper_gluon", 90, head_dim, ragged=True, dtype="fp16")
        for masks in ({"biased": True}, {"words": True}, {"biased": True, "words": True}):
            for bound in (False, True):
                for ragged in (False, True):
                    yield Variant("hopper_gluon", 90, head_dim, ragged, bound=bound, **masks)
            yield Variant("hopper_gluon", 90, head_dim, ragged=True, queued=True, **masks)
        yield Variant("hopper_gluon", 90, head_dim, False, box=True, bound=True, biased=True)
        yield Variant("pooled_gluon", 90, head_dim, ragged=True, dtype="fp16")
        for ragged in (False, True):
            for bound in (False, True):
                for order in (False, True):
                    yield Variant("pooled_gluon", 90, head_dim, ragged, bound=bound, order=order)


def gluon(variant: Variant) -> Report:
    """Compiles one of `in_gluon` as its launcher would."""
    if variant.kernel == "pooled_gluon":
        return _pooled(variant)
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language import NVMMASharedLayout

    from dit_sparse.kernels._gluon_fetch import ROWS
    from dit_sparse.kernels._hopper_gluon import _block_sparse_fwd_hopper_gluon

    dim, rings = variant.head_dim, hopper_gluon.rings_for(variant.head_dim)
    constants = {"D": dim, "BLOCK_D": dim, "BLOCK_N": K_BLOCK, "RAGGED": variant.ragged}
    constants |= {"HAS_ORDER": variant.order, "BOUND": variant.bound, "DEALT": variant.queued}
    constants |= {"Q_SLOTS": rings.queries, "SLOTS": rings.keys, "V_SLOTS": rings.values}
    constants |= {} if variant.grouped else {"group": 1}
    layout, dtype = NVMMASharedLayout(128, 16, 2), variant.dtype
    rows = {"q_desc": ROWS.value, "k_desc": K_BLOCK, "v_desc": K_BLOCK}
    described = {name: f"tensordesc<{dtype}[{n}, {dim}],{layout!r}>" for name, n in rows.items()}
    rows, layout = (
        {"classes_desc": ROWS.value, "hidden_desc": K_BLOCK},
        NVMMASharedLayout(64, 16, 2),
    )
    for name, n in rows.items():
        described[name] = f"tensordesc<{dtype}[{n}, {COLUMNS}],{layout!r}>"
    constants |= {"COLUMNS": COLUMNS} if variant.box else {"COLUMNS": 0, **dict.fromkeys(rows)}
    constants |= {"HAS_BIAS": variant.biased, "HAS_WORDS": variant.words}
    pointers = {"out_ptr": f"*{dtype}"}
    pointers |= dict.fromkeys(("bias_ptr", "highest_ptr"), "*fp32" if variant.biased else "*i32")
    function = _block_sparse_fwd_hopper_gluon
    source = source_of(function, constants, described, pointers, GluonASTSource)
    return report_of(variant, source, 4, 2)


def _pooled(variant: Variant) -> Report:
    """The kernel for pooled entries."""
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language import NVMMASharedLayout

    from dit_sparse.kernels._gluon_fetch import ROWS
    from dit_sparse.kernels._gluon_pooled import _pooled_fwd_hopper_gluon

    dim, keys, dtype = variant.head_dim, pooled.ROWS_IN_GLUON, variant.dtype
    rings = hopper_gluon.rings_for(dim)
    layout = NVMMASharedLayout(128, 16, 2)
    rows = {"q_desc": ROWS.value, "k_desc": keys, "v_desc": keys}
    described = {name: f"tensordesc<{dtype}[{n}, {dim}],{layout!r}>" for name, n in rows.items()}
    constants = {"D": dim, "BLOCK_D": dim, "BLOCK_N": K_BLOCK, "KEYS": keys}
    constants |= {"EACH": K_BLOCK // 2 // keys, "MOST": (K_BLOCK // keys).bit_length() - 1}
    constants |= {"RAGGED": variant.ragged, "HAS_ORDER": variant.order, "BOUND": variant.bound}
    constants |= {"Q_SLOTS": rings.queries, "SLOTS": rings.keys, "V_SLOTS": rings.values}
    pointers = {"out_ptr": f"*{dtype}"}
    source = source_of(_pooled_fwd_hopper_gluon, constants, described, pointers, GluonASTSource)
    return report_of(variant, source, 4, 2, most=pooled.SPILLS)
