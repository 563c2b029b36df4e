"""Looks at a machine: versions, device, which attention backends really run, whole models."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_sparse import models
from dit_sparse.attention import attend, backends
from dit_sparse.backend import Backend
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.kernels.architecture import MEASURED, architecture
from dit_sparse.method import CallContext
from dit_sparse.methods.window import WindowMethod
from dit_sparse.plan import BlockPlan

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate")

_DENSE = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)

# Largest difference from float64 attention on the probe, whose outputs are of size 1.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Check:
    """Whether one thing works here, and a sentence with the reason or the evidence."""

    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{'yes' if self.ok else 'no ':<4} {self.name:<20} {self.detail}"


@dataclass(frozen=True)
class Diagnosis:
    """What `examine` found.

    Args:
        versions: package name to version, `None` when it is not installed.
        device: what the probes ran on.
        sparse: one check per backend of `dit_sparse.attention.backends()`, in order of preference,
            and one of Triton's portable kernel alone: it may work where a GPU's own does not.
        dense: one check per backend of PyTorch's scaled_dot_product_attention.
        models: one check per embedded model: whether all its files are as they were made.
    """

    versions: dict[str, str | None]
    device: str
    sparse: tuple[Check, ...]
    dense: tuple[Check, ...]
    models: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether sparse attention runs at all."""
        return any(check.ok for check in self.sparse)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        versions = [f"{name:<14}{v or 'not installed'}" for name, v in self.versions.items()]
        return "\n".join(
            [
                *versions,
                f"{'device':<14}{self.device}",
                "",
                "Sparse backends, the first that runs a call is used:",
                *map(str, self.sparse),
                "",
                "Dense backends of PyTorch:",
                *map(str, self.dense),
                "",
                "Embedded models, every file against its digest:",
                *map(str, self.models),
            ]
        )


@dataclass(frozen=True, eq=False)
class _Probe:
    """A small self-attention problem: q, k, v `[1, 2, 1056, 128]` and a window plan for it.

    Its blocks are of the default size; some are whole, some masked, some short, some not visited.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    plan: BlockPlan

    @staticmethod
    def on(device: torch.device) -> _Probe:
        layout = TokenLayout.of(TokenGrid(4, 12, 22))
        generator = torch.Generator().manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        q, k, v = (
            torch.randn(1, 2, layout.length, 128, generator=generator).to(device, dtype)
            for _ in range(3)
        )
        window = WindowMethod(window=(4, 8, 16), tile=(4, 4, 8))
        plan = window.plan(q, k, CallContext(layout))
        return _Probe(q, k, v, plan)

    def error(self, out: Tensor, *, sparse: bool) -> float:
        """Largest difference between `out` and float64 attention."""
        mask = self.plan.to_mask().cpu() if sparse else None
        q, k, v = (t.cpu().double() for t in (self.q, self.k, self.v))
        exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return float((out.cpu().double() - exact).abs().max())


def examine(device: torch.device | str | None = None) -> Diagnosis:
    """Runs a small problem through every backend and compares it with float64 attention.

    The files of the embedded models are read in full.

    Args:
        device: by default the GPU if there is one, else the CPU.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    probe = _Probe.on(device)
    versions: dict[str, str | None] = {"python": platform.python_version()}
    return Diagnosis(
        versions=versions | {package: _version(package) for package in PACKAGES},
        device=_describe(device),
        sparse=(*_missing(), *(_check_sparse(*b, probe) for b in _named_backends(probe))),
        dense=tuple(_check_dense(kernel, probe) for kernel in _DENSE),
        models=tuple(_check_model(models.get(name)) for name in models.names()),
    )


def _missing() -> tuple[Check, ...]:
    if _version("triton") is not None:
        return ()
    return (Check("triton", False, "Triton is not installed. On Linux: pip install triton."),)


def _named_backends(probe: _Probe) -> Iterator[tuple[str, Backend]]:
    for backend in backends():
        yield backend.name, backend
        refused = backend.refuses(probe.q, probe.k, probe.v, probe.plan)
        if backend.name == "triton" and refused is None:
            yield "triton, portable", _portable(probe)


def _portable(probe: _Probe) -> Backend:
    """The backend with the tile that it would choose itself, which keeps it from other kernels."""
    from dit_sparse.kernels.block_sparse import TritonBackend
    from dit_sparse.kernels.tiles import choose_tile

    q, plan = probe.q, probe.plan
    sizes = (q.shape[-1], q.element_size(), plan.q_blocks.size, plan.k_blocks.size)
    return TritonBackend(
        tile=choose_tile(architecture(q.device), *sizes, boxed=plan.box is not None)
    )


def _check_sparse(name: str, backend: Backend, probe: _Probe) -> Check:
    refusal = backend.refuses(probe.q, probe.k, probe.v, probe.plan)
    if refusal is not None:
        return Check(name, False, refusal)
    return _check(
        name,
        lambda: attend(probe.q, probe.k, probe.v, probe.plan, backend=backend).out,
        lambda out: probe.error(out, sparse=True),
    )


def _check_dense(kernel: SDPBackend, probe: _Probe) -> Check:
    def run() -> Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(probe.q, probe.k, probe.v)

    return _check(
        kernel.name.lower().removesuffix("_attention"),
        run,
        lambda out: probe.error(out, sparse=False),
    )


def _check(name: str, run: Callable[[], Tensor], measure: Callable[[Tensor], float]) -> Check:
    try:
        out = run()
        error = measure(out)
    except Exception as failure:  # whatever a broken installation raises is the finding
        reason = (str(failure).strip() or repr(failure)).splitlines()[0]
        return Check(name, False, f"{type(failure).__name__}: {reason}")
    allowed = _TOLERANCE[out.dtype]
    verdict = "" if error <= allowed else f", more than the {allowed:g} that rounding explains"
    return Check(name, error <= allowed, f"largest error {error:.1e} in {out.dtype}{verdict}")


def _check_model(model: models.EmbeddedModel) -> Check:
    fault = model.damage(digests=True)
    return Check(model.name, fault is None, fault or f"whole, in {model.folder}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"
    properties = torch.cuda.get_device_properties(device)
    about = f"{device} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    name = architecture(device)
    if name in MEASURED:
        return f"{about}, {name}: the GPU tests have run there)"
    return f"{about}, {name}: nobody ran the kernels there, they give known answers first)"
