"""Imports point one way, and optional packages are loaded only where they are needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module imports from its own row and from those above it.
LAYERS = (
    ("grid", "models", "model_identity", "step_segments", "list_lengths"),
    (
        "predicate",
        "pools",
    ),
    ("plan", "mask_product", "density", "words"),
    (
        "orders",
        "attention_map",
        "block_budget",
        "block_times",
        "calibration",
        "calibration_solver",
        "causal",
        "mask_feed",
        "coarse",
        "correction",
        "frame",
        "importance",
        "levels",
        "options",
        "pyramid",
        "selection",
        "tally",
        "neighbourhood",
        "per_axis",
        "tile_lists",
        "plan_lists",
        "shares",
        "simulator",
        "tiling",
        "window_plan",
        "window_table",
        "plan_check",
        "plan_io",
        "progress_file",
        "method",
        "backend",
        "forward",
        "summaries",
        "kernels",
    ),
    ("methods", "hoist"),
    ("attention",),
    ("ops", "plan_cache", "plan_reuse", "record", "session", "window_search"),
    ("bench", "window_candidates"),
    ("window_tally",),
    ("pipelines",),
    ("doctor", "media", "metrics", "commands", "evaluation", "cli", "__main__"),
)
OPTIONAL = {
    "diffusers": ("pipelines", "commands", "cli", "__main__"),
    "transformers": ("pipelines", "commands", "evaluation", "cli", "__main__"),
    "triton": ("kernels",),
}


def sources() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for folder, package in (
        ("dit_sparse", "dit_sparse"),
        ("kernels", "dit_sparse.kernels"),
        ("pipelines", "dit_sparse.pipelines"),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            relative = path.relative_to(ROOT / folder).with_suffix("")
            if relative.parts[0] in ("kernels", "pipelines"):
                continue  # the links: these modules are listed from their own folders
            parts = [package, *relative.parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = sources()
# The package itself has no row: it imports lazily whatever is asked of it.
MODULES = sorted(set(SOURCES) - {"dit_sparse"})


def layer(module: str) -> int:
    part = module.split(".")[1]
    for number, parts in enumerate(LAYERS):
        if part in parts:
            return number
    pytest.fail(f"{module} has no place in LAYERS: say from where it may import.")


def imports(module: str, *, at_load: bool = False) -> Iterator[str]:
    """Dotted names that a module imports; `at_load`: only those that loading it imports."""
    tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
    for node in _at_load(tree.body) if at_load else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                # `from package import module` means the module, not the package.
                yield name if name in SOURCES else str(node.module)


def _at_load(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from _at_load(node.body)
        yield node


def run_fresh(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_walk_sees_the_package():
    assert {"dit_sparse.plan", "dit_sparse.kernels.reference", "dit_sparse.methods"} <= set(MODULES)
    assert "dit_sparse.pipelines.family" in MODULES
    assert "dit_sparse.orders" in set(imports("dit_sparse.window_plan"))


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    own = layer(module)
    upward = {
        name
        for name in imports(module)
        if name.startswith("dit_sparse.") and name in SOURCES and layer(name) > own
    }
    assert not upward, f"{module} imports from a later layer"


def test_no_import_cycles():
    graph = {
        module: {name for name in imports(module, at_load=True) if name in MODULES} - {module}
        for module in MODULES
    }
    TopologicalSorter(graph).prepare()  # raises CycleError with the modules of a cycle


def test_methods_do_not_know_kernels():
    for module in (m for m in MODULES if m.startswith("dit_sparse.methods")):
        assert not [n for n in imports(module) if n.startswith("dit_sparse.kernels")]


@pytest.mark.parametrize("package", OPTIONAL)
def test_optional_packages_stay_where_they_belong(package):
    users = {m for m in MODULES if any(n.split(".")[0] == package for n in imports(m))}
    strangers = {m for m in users if m.split(".")[1] not in OPTIONAL[package]}
    assert not strangers


def test_import_loads_no_optional_package():
    loaded = run_fresh(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import dit_sparse\n"
        "dit_sparse.TokenGrid, dit_sparse.BlockPlan, dit_sparse.SparseMethod, dit_sparse.attend\n"
        "dit_sparse.methods.names()\n"
        "import dit_sparse.orders, dit_sparse.plan_io\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new & {'triton', 'diffusers', 'transformers', 'accelerate', 'typer'}))"
    )
    assert loaded == ""


def test_a_kernel_that_needs_triton_is_missed_where_there_is_none():
    out = run_fresh(
        "import sys\n"
        "sys.modules['triton'] = None  # importing it raises ImportError\n"
        "from dit_sparse.backend import kernel_module\n"
        "print([kernel_module(n) is None for n in ('pool', 'choose', 'importance', 'reference')])\n"
        "try:\n"
        "    kernel_module('nothing')\n"
        "except ImportError as error:\n"
        "    print(error.name)\n"
    )
    assert out == "[True, True, True, False]\ndit_sparse.kernels.nothing"


def test_attention_works_without_optional_packages():
    out = run_fresh(
        "import sys\n"
        "for name in ('triton', 'diffusers', 'transformers'):\n"
        "    sys.modules[name] = None  # importing it raises ImportError\n"
        "import torch, dit_sparse\n"
        "from dit_sparse.plan import BlockPlan, Blocks\n"
        "q = torch.randn(1, 2, 10, 8)\n"
        "blocks = Blocks.uniform(10, 4)\n"
        "plan = BlockPlan.from_mask(torch.ones(1, 1, 3, 3, dtype=torch.bool), blocks, blocks)\n"
        "out = dit_sparse.attend(q, q, q, plan).out\n"
        "dense = torch.nn.functional.scaled_dot_product_attention(q, q, q)\n"
        "print(torch.allclose(out, dense, atol=1e-5))"
    )
    assert out == "True"
