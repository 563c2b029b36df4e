"""Measures the kernel variants on this GPU and writes the table that choices are made from.

    python scripts/tune_kernels.py --output kernels/variants.json

Every variant is compiled, checked against float64 and timed in a process of its own with a time
limit, since a specialised kernel that waits for itself never ends: that is a refusal like any
other, and recorded. Rows for other GPUs and Triton versions stay as they are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a bare checkout

from dit_sparse.attention import attend
from dit_sparse.backend import AttentionOutput
from dit_sparse.bench import environment, time_interleaved
from dit_sparse.kernels import hopper, hopper_persistent, norms, portable
from dit_sparse.kernels.tiles import choose_tile
from dit_sparse.kernels.variants import Kernel, Table, Whole, table
from dit_sparse.plan import BlockPlan, Blocks

ERROR = 1e-2  # relative, of 16-bit products
HEADS, TOKENS, DENSITIES = 24, 16_384, (0.1, 0.2)


@dataclass(frozen=True)
class Trial:
    """One variant on one kind of problem; the fields of `variants.Whole`."""

    kernel: Kernel
    dtype: str
    head_dim: int
    ragged: bool


def trials(dtypes: Sequence[str]) -> Iterator[Trial]:
    for dtype, head_dim, ragged in itertools.product(dtypes, (64, 128), (False, True)):
        for kernel in get_args(Kernel):
            yield Trial(kernel, dtype, head_dim, ragged)


def problem(
    trial: Trial, tokens: int, heads: int, density: float
) -> tuple[list[torch.Tensor], BlockPlan]:
    """q, k and v, and a plan with as many random blocks in every row."""
    generator = torch.Generator("cuda").manual_seed(0)
    tokens -= 40 if trial.ragged else 0
    shape, dtype = (1, heads, tokens, trial.head_dim), getattr(torch, trial.dtype)
    made = (torch.randn(shape, generator=generator, device="cuda") for _ in range(3))
    blocks = Blocks.uniform(tokens, 128, "cuda")
    scores = torch.rand(1, heads, blocks.n, blocks.n, generator=generator, device="cuda")
    kept = scores.topk(max(1, round(density * blocks.n)), dim=-1).indices
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)
    return [x.to(dtype) for x in made], BlockPlan.from_mask(mask, blocks, blocks)


def runner(
    trial: Trial, qkv: Sequence[torch.Tensor], plan: BlockPlan, result: AttentionOutput
) -> Callable[[], object]:
    """A function that runs the variant; it returns `None` if the variant refuses."""
    q, k, v = qkv
    scale = trial.head_dim**-0.5
    lengths = None
    if trial.dtype == "bfloat16" and trial.kernel != "portable":
        lengths = norms.empty(q)
        norms.measure(q, k, lengths)
    if trial.kernel == "portable":
        sizes = (trial.head_dim, 2, 128, 128)
        tile = choose_tile(torch.cuda.get_device_capability(), *sizes, boxed=False)
        return lambda: portable.launch(q, k, v, plan, scale, tile, result)
    if trial.kernel == "hopper":
        return lambda: hopper.launch(q, k, v, plan, scale, result, lengths=lengths)
    each = max(2, hopper_persistent.blocks_each(q, plan, masked=False))
    return lambda: hopper_persistent.launch(
        q, k, v, plan, scale, result, each=each, lengths=lengths
    )


def room(q: torch.Tensor) -> AttentionOutput:
    lse = torch.full(q.shape[:3], float("nan"), device=q.device)
    return AttentionOutput(torch.full_like(q, float("nan")), lse)


def measured(trial: Trial) -> float | str:
    """Milliseconds over `DENSITIES`, or why the variant is refused."""
    qkv, plan = problem(trial, 4096, 2, 0.3)
    result = room(qkv[0])
    if runner(trial, qkv, plan, result)() is None:
        return "the compile check refuses it"
    exact = attend(*(x.double() for x in qkv), plan, backend="reference").out
    error = float((result.out.double() - exact).norm() / exact.norm())
    if not error <= ERROR:
        return f"{error:.1e} from float64"
    total = 0.0
    for density in DENSITIES:
        qkv, plan = problem(trial, TOKENS, HEADS, density)
        run = runner(trial, qkv, plan, room(qkv[0]))
        total += time_interleaved({"it": run}, "cuda", rounds=9)["it"].median
    return round(total, 4)


def tried(command: Sequence[str], seconds: float) -> float | str:
    """What a process prints last, as JSON, or why there is nothing to be read."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"did not end within {seconds:g} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return f"failed: {lines[-1][:200] if lines else f'exit status {done.returncode}'}"
    found: float | str = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def row_of(key: Trial, seen: Mapping[str, float | str], architecture: str, version: str) -> Whole:
    """The row for a kind of problem: the fastest variant that was not refused.

    Raises:
        RuntimeError: every variant was refused.
    """
    times = {name: took for name, took in seen.items() if not isinstance(took, str)}
    if not times:
        raise RuntimeError(
            f"Expected some kernel to run {key.dtype} with a head dim of {key.head_dim}, got "
            f"{dict(seen)}. Mend the kernels first."
        )
    kernel = min(get_args(Kernel), key=lambda name: times.get(name, float("inf")))
    problem = (key.dtype, key.head_dim, key.ragged)
    return Whole(architecture, version, *problem, kernel, "measured", dict(seen))


def merged(before: Table, rows: Sequence[Whole], made: Mapping[str, object]) -> Table:
    """The table with these rows in the places of those for the same problems."""

    def key(row: Whole) -> tuple[object, ...]:
        return (row.architecture, row.triton, row.dtype, row.head_dim, row.ragged)

    new = {key(row) for row in rows}
    kept = [row for row in before.whole if key(row) not in new]
    whole = tuple(sorted([*kept, *rows], key=lambda row: [str(part) for part in key(row)]))
    names = {f"{row.architecture}, Triton {row.triton}": dict(made) for row in rows}
    return replace(before, provenance={**before.provenance, **names}, whole=whole)


def text_of(whole: Table) -> str:
    """JSON with a line for each row."""
    record = whole.record()
    lists = (
        f'  "{name}": [\n    ' + ",\n    ".join(json.dumps(row) for row in record[name]) + "\n  ]"
        for name in ("whole", "masked", "tiles")
    )
    provenance = json.dumps(record["provenance"], indent=2).replace("\n", "\n  ")
    return "{\n" + ",\n".join([f'  "provenance": {provenance}', *lists]) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("kernels/variants.json"))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=90.0, help="of one variant, to be refused")
    parser.add_argument("--trial", help=argparse.SUPPRESS)  # JSON of a Trial: run it, and no other
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("Expected a CUDA GPU, found none. The table is made of measurements.")
    if arguments.trial:
        print(json.dumps(measured(Trial(**json.loads(arguments.trial)))))
        return
    made = environment("cuda") | {"date": time.strftime("%Y-%m-%d")}
    architecture = "sm_" + "".join(str(made["capability"]).split("."))
    version = ".".join(str(made["triton"]).split(".")[:2])
    seen: dict[Trial, dict[str, float | str]] = {}
    for trial in trials(arguments.dtypes):
        command = [sys.executable, __file__, "--trial", json.dumps(asdict(trial))]
        took = tried(command, arguments.seconds)
        print(trial, took, flush=True)
        seen.setdefault(replace(trial, kernel="portable"), {})[trial.kernel] = took
    rows = [row_of(key, one, architecture, version) for key, one in seen.items()]
    arguments.output.write_text(text_of(merged(table(), rows, made)), encoding="utf-8")


if __name__ == "__main__":
    main()
