"""The shape of the source tree: links, names, lengths and what must not occur."""

import ast
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("kernels", "pipelines")
MAX_MODULE = 400
MAX_FUNCTION = {"kernels": 120}
# Names that say nothing, or that shadow a module of the standard library or a dependency.
BANNED = {"utils", "util", "common", "misc", "helpers", "triton", "types", "select", "math"}


def sources() -> list[Path]:
    """Python files of the package and the scripts, relative to the root, links not followed."""
    found = []
    for folder in ("dit_sparse", *LINKED, "scripts"):
        for directory, _, files in os.walk(ROOT / folder):
            here = Path(directory).relative_to(ROOT)
            found += [here / name for name in files if name.endswith(".py")]
    return sorted(found)


SOURCES = sources()
LIBRARY = [path for path in SOURCES if path.parts[0] != "scripts"]


def functions(path: Path) -> list[ast.FunctionDef]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def body_lines(function: ast.FunctionDef) -> int:
    """Lines of code and comments; a signature and a docstring are no code to follow."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_the_walk_sees_every_folder():
    assert {path.parts[0] for path in LIBRARY} == {"dit_sparse", *LINKED}
    assert not [path for path in LIBRARY if path.parts[:2] == ("dit_sparse", "kernels")]


@pytest.mark.parametrize("folder", LINKED)
def test_linked_folders_are_namespaces(folder):
    """With an `__init__.py`, a top-level `kernels` would shadow Hugging Face's package."""
    assert not (ROOT / folder / "__init__.py").exists()
    link = ROOT / "dit_sparse" / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../{folder}"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_modules_and_functions_are_short(path):
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_MODULE
    limit = MAX_FUNCTION.get(path.parts[0], 40)
    long = {f.name: n for f in functions(path) if (n := body_lines(f)) > limit}
    assert not long


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_names_say_something(path):
    assert path.stem not in BANNED
    assert not BANNED & set(path.parts[1:-1])


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_public_functions_of_the_library_name_their_arguments(path):
    """A catch-all swallows misspelt options, and a typo must not run dense."""
    loose = [f.name for f in functions(path) if f.args.kwarg and not f.name.startswith("_")]
    assert not loose


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_functions_are_annotated(path):
    if path.parts[0] == "kernels" and path.stem.startswith("_"):
        pytest.skip("pointers of jit functions have no type")
    bare = [
        f"{f.name}({a.arg})"
        for f in functions(path)
        for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)
        if a.annotation is None and a.arg not in ("self", "cls")
    ]
    assert not bare
    assert not [f.name for f in functions(path) if f.returns is None and f.name != "main"]


def test_jit_functions_are_private_to_the_kernels():
    """`_x.py` holds jit functions alone, so that reading a launcher needs no Triton."""
    for path in (p for p in LIBRARY if p.parts[0] == "kernels"):
        decorated = [
            f.name
            for f in functions(path)
            if any("jit" in ast.unparse(d) for d in f.decorator_list)
        ]
        assert bool(decorated) == path.stem.startswith("_"), path
