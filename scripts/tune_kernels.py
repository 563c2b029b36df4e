"""Measures the kernel variants on this GPU and writes the table that choices are made from.

    python scripts/tune_kernels.py --output kernels/variants.json

Every variant is compiled, checked against float64 and timed in a process of its own with a time
limit, since a specialised kernel that waits for itself never ends: that is a refusal like any
other, and recorded. What computes masked entries is also run many times on memory full of NaN, as
what goes wrong there goes wrong now and then. Rows for other GPUs and Triton versions stay as they
are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a bare checkout

from dit_sparse.attention import attend
from dit_sparse.backend import AttentionOutput
from dit_sparse.bench import environment, time_interleaved
from dit_sparse.kernels import hopper, hopper_gluon, norms, portable
from dit_sparse.kernels.variants import Kernel, Masked, Masking, Table, Whole, table
from dit_sparse.plan import BlockPlan, Blocks
from scripts import tune_masked
from scripts.tune_masked import ERROR, HEADS, room, tile_for

TOKENS, DENSITIES = 16_384, (0.1, 0.2)
DTYPES = ("bfloat16", "float16")
ENTRIES = ("whole", "masked")
# Medians of different processes differ by as much from run to run.
NOISE = 0.05

_Row = TypeVar("_Row", bound=Whole | Masked)


@dataclass(frozen=True)
class Trial:
    """One variant on one kind of problem.

    Args:
        kernel, dtype, head_dim, ragged: see `variants.Whole`.
        masked: whether entries are masked by coordinates; `kernel` is then what masks them.
    """

    kernel: Kernel
    dtype: str
    head_dim: int
    ragged: bool
    masked: bool = False

    @property
    def problem(self) -> str:
        return f"{self.dtype}, head dim {self.head_dim}{', short blocks' if self.ragged else ''}"


def trials(dtypes: Sequence[str], *, masked: bool = False) -> Iterator[Trial]:
    for dtype, head_dim, ragged in itertools.product(dtypes, (64, 128), (False, True)):
        for kernel in get_args(Masking if masked else Kernel):
            yield Trial(kernel, dtype, head_dim, ragged, masked)


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
        tile = tile_for(q, boxed=False)
        return lambda: portable.launch(q, k, v, plan, scale, tile, result)
    launch = hopper.launch if trial.kernel == "hopper" else hopper_gluon.launch
    return lambda: launch(q, k, v, plan, scale, result, lengths=lengths)


def measured(trial: Trial) -> float | str:
    """Milliseconds over `DENSITIES`, or why the variant is refused."""
    if trial.masked:
        return tune_masked.measured(
            trial.dtype, trial.head_dim, product=trial.kernel == "hopper", ragged=trial.ragged
        )
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


def fastest(seen: Mapping[str, float | str], names: Sequence[str], what: str) -> str:
    """The first in time of those that were not refused.

    Raises:
        RuntimeError: every variant was refused.
    """
    times = {name: took for name, took in seen.items() if not isinstance(took, str)}
    if not times:
        raise RuntimeError(
            f"Expected some kernel to run {what}, got {dict(seen)}. Mend the kernels first."
        )
    return min(names, key=lambda name: times.get(name, float("inf")))


def row_of(key: Trial, seen: Mapping[str, float | str], architecture: str, version: str) -> Whole:
    """The row for a kind of problem: the fastest variant that was not refused."""
    what = f"{key.dtype} with a head dim of {key.head_dim}"
    kernel = cast(Kernel, fastest(seen, get_args(Kernel), what))
    problem = (key.dtype, key.head_dim, key.ragged)
    return Whole(architecture, version, *problem, kernel, "measured", dict(seen))


def rows_of(
    found: Mapping[Trial, float | str], architecture: str, version: str
) -> list[Whole | Masked]:
    """A row for each kind of problem without masks, and one for all with masks.

    There a variant takes the sum of its times, and is refused where it is for any problem.
    """
    seen: dict[Trial, dict[str, float | str]] = {}
    masks: dict[str, dict[Trial, float | str]] = {}
    for trial, took in found.items():
        if trial.masked:
            masks.setdefault(trial.kernel, {})[trial] = took
        else:
            seen.setdefault(replace(trial, kernel="portable"), {})[trial.kernel] = took
    rows: list[Whole | Masked] = [row_of(key, o, architecture, version) for key, o in seen.items()]
    if masks:
        sums = {kernel: summed(tries) for kernel, tries in masks.items()}
        kernel = cast(Masking, fastest(sums, get_args(Masking), "masked entries"))
        rows.append(Masked(architecture, version, kernel, "measured", sums))
    return rows


def summed(tries: Mapping[Trial, float | str]) -> float | str:
    """Milliseconds of all problems, or the first refusal."""
    total = 0.0
    for trial, took in tries.items():
        if isinstance(took, str):
            return f"{trial.problem}: {took}"
        total += took
    return round(total, 4)


def merged(before: Table, rows: Sequence[Whole | Masked], made: Mapping[str, object]) -> Table:
    """The table with these rows in the places of those for the same problems. A variant that was
    chosen before stays where no other is faster by more than `NOISE`."""

    def key(row: Whole | Masked) -> tuple[str, ...]:
        of_problem = (row.dtype, row.head_dim, row.ragged) if isinstance(row, Whole) else ()
        return tuple(map(str, (row.architecture, row.triton, *of_problem)))

    def put(old: Sequence[_Row], new: Sequence[_Row]) -> tuple[_Row, ...]:
        found: dict[tuple[str, ...], _Row] = {key(row): row for row in old}
        for row in new:
            found[key(row)] = _steady(found[key(row)], row) if key(row) in found else row
        return tuple(found.values())

    whole = put(before.whole, [row for row in rows if isinstance(row, Whole)])
    masked = put(before.masked, [row for row in rows if isinstance(row, Masked)])
    provenance = dict(before.provenance)
    for row in rows:
        what = ", masked entries" if isinstance(row, Masked) else ""
        provenance[f"{row.architecture}, Triton {row.triton}{what}"] = dict(made)
    return replace(before, provenance=provenance, whole=whole, masked=masked)


def _steady(before: _Row, row: _Row) -> _Row:
    """A row with the choice of before, unless that is refused now or slower beyond noise."""
    took, best = row.trials.get(before.kernel), row.trials.get(row.kernel)
    if isinstance(took, str) or took is None or isinstance(best, str) or best is None:
        return row
    if took > (1 + NOISE) * best:
        return row
    return cast(_Row, replace(cast(Any, row), kernel=before.kernel))


def text_of(whole: Table) -> str:
    """JSON with a line for each row."""
    record = whole.record()
    lists = (
        f'  "{name}": [\n    ' + ",\n    ".join(json.dumps(row) for row in record[name]) + "\n  ]"
        for name in ("whole", "masked", "tiles")
    )
    provenance = json.dumps(record["provenance"], indent=2).replace("\n", "\n  ")
    return "{\n" + ",\n".join([f'  "provenance": {provenance}', *lists]) + "\n}\n"


def in_processes(tries: Iterable[Trial], seconds: float) -> dict[Trial, float | str]:
    """What every variant took, or why it is refused."""
    found: dict[Trial, float | str] = {}
    refused = set()
    for trial in tries:
        if trial.masked and trial.kernel in refused:
            continue  # one row is for all of them
        command = [sys.executable, __file__, "--trial", json.dumps(asdict(trial))]
        found[trial] = took = tried(command, seconds)
        print(trial, took, flush=True)
        if isinstance(took, str):
            refused.add(trial.kernel)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("kernels/variants.json"))
    parser.add_argument("--entries", nargs="+", choices=ENTRIES, default=ENTRIES)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, help="of whole entries")
    parser.add_argument(
        "--seconds", type=float, default=90.0, help="of one variant; twice with masks"
    )
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
    now = table()
    for entries in ENTRIES:  # those with masks run in the kernels that were chosen for the others
        if entries in arguments.entries:
            masked = entries == "masked"
            tries = trials(DTYPES if masked else arguments.dtypes, masked=masked)
            seconds = arguments.seconds * (2 if masked else 1)  # of several kernels
            found = in_processes(tries, seconds)
            now = merged(now, rows_of(found, architecture, version), made)
            arguments.output.write_text(text_of(now), encoding="utf-8")


if __name__ == "__main__":
    main()
