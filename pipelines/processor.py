"""One attention processor for every model: its own stock processor with the attention core rebound.

`sparse_class` makes, once per stock class, a class whose `__call__` is the stock source with two
names replaced: `dispatch_attention_fn(...)` and `scaled_dot_product_attention(...)` become calls of
the processor's `AttentionCore`. Projections, norms, position embedding, LoRA and quantised weights
stay the business of diffusers, and nothing of it is repeated here.

The classes can be imported from here by name, `SparseWanAttnProcessor` for `WanAttnProcessor`.
"""

from __future__ import annotations
import __future__

import ast
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType
from typing import Any

from diffusers.hooks._helpers import AttentionProcessorRegistry
from torch import nn

from dit_sparse.pipelines.core import AttentionCore
from dit_sparse.pipelines.family import families

_CORES = {"dispatch_attention_fn": "dispatch", "scaled_dot_product_attention": "sdpa"}


def sparse_processor(stock: object, core: AttentionCore) -> Any:
    """A processor that does what `stock` does, with `core` for its attention function.

    Raises:
        ValueError: a processor that cannot be rebound; see `sparse_class`.
    """
    return sparse_class(type(stock))(stock, core)  # type: ignore[arg-type]


@cache
def sparse_class(stock: type[Any]) -> type[Any]:
    """The rebound class of a stock processor class.

    It has the stock signature, since diffusers filters keyword arguments by it, the stock line
    numbers in tracebacks, and the stock entry in diffusers' registry of processors.

    Raises:
        ValueError: a class with weights of its own, without readable source, or whose `__call__`
            calls neither attention function.
    """
    if issubclass(stock, nn.Module):
        raise ValueError(
            f"Expected an attention processor without weights, got {stock.__name__}, which is a "
            "module. Unload its adapter first."
        )
    call = _rebound(inspect.unwrap(stock.__call__), stock)
    members = {
        "__module__": __name__,
        "__doc__": f"{stock.__name__} whose attention may be sparse.",
        "__init__": _init,
        "__call__": call,
        "_attention_backend": None,
        "_parallel_config": None,
    }
    sparse = type(f"Sparse{stock.__name__}", (stock,), members)
    _register(stock, sparse)
    return sparse


def _init(self: Any, stock: object, core: AttentionCore) -> None:
    vars(self).update(vars(stock))
    self.core = core


class _Rebinder(ast.NodeTransformer):
    """Replaces the calls of attention functions by calls of `self.core.serving(attn)`.

    Args:
        this, module: names of the first two parameters.
    """

    def __init__(self, this: str, module: str) -> None:
        self.this = this
        self.module = module
        self.found = 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
        if name in _CORES:
            core = f"{self.this}.core.serving({self.module}).{_CORES[name]}"
            function = ast.parse(core, mode="eval").body
            for part in ast.walk(function):
                ast.copy_location(part, node.func)
            node.func = function
            self.found += 1
        return node


def _rebound(function: FunctionType, stock: type) -> Callable[..., Any]:
    """The function with its attention calls replaced, in its own module's globals."""
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError) as error:
        raise ValueError(
            f"Expected the source of {stock.__name__}.__call__, got none ({error}). Install "
            "diffusers from a wheel or a checkout."
        ) from error
    tree = ast.parse(textwrap.dedent("".join(lines)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    this, module = (argument.arg for argument in definition.args.args[:2])
    rebinder = _Rebinder(this, module)
    rebinder.visit(tree)
    if not rebinder.found or function.__closure__:
        raise ValueError(
            f"Expected {stock.__name__}.__call__ to call {' or '.join(_CORES)} and to close over "
            "nothing, got one that does not. This processor cannot become sparse."
        )
    ast.increment_lineno(ast.fix_missing_locations(tree), first - 1)
    flags = function.__code__.co_flags & __future__.annotations.compiler_flag
    code = compile(tree, function.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    namespace: dict[str, Any] = {}
    exec(code, function.__globals__, namespace)  # defines into `namespace`, reads stock globals
    return namespace[definition.name]


def _register(stock: type[Any], sparse: type[Any]) -> None:
    """Gives a class the metadata that layer-skipping hooks look up by exact class."""
    try:
        metadata = AttentionProcessorRegistry.get(stock)
    except ValueError:
        return  # stock diffusers refuses these hooks too
    AttentionProcessorRegistry.register(sparse, metadata)


def _stock_classes() -> Iterator[type]:
    diffusers = importlib.import_module("diffusers")
    shared = importlib.import_module("diffusers.models.attention_processor")
    for family in families().values():
        models = [getattr(diffusers, name, None) for name in family.transformers]
        homes = [importlib.import_module(m.__module__) for m in models if m is not None]
        for name in family.processors:
            found = (getattr(home, name, None) for home in (*homes, shared))
            yield from (c for c in found if isinstance(c, type))


def __getattr__(name: str) -> Any:
    if name.startswith("Sparse"):
        for stock in _stock_classes():
            if name == f"Sparse{stock.__name__}":
                return sparse_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
