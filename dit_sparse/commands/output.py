"""What every command does with its result and with refused input."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

logger = logging.getLogger("dit_sparse")

Format = Annotated[str, typer.Option("--format", help="text or json (one object on stdout).")]


@contextmanager
def sentences(output_format: str) -> Iterator[None]:
    """Turns ValueError, which is how this package refuses input, into a sentence and exit 2."""
    from dit_sparse.commands.words import among

    try:
        among(output_format, ("text", "json"), "--format")
        yield
    except ValueError as error:
        logger.debug("The refused input was found here:", exc_info=True)
        typer.echo(f"dit-sparse: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None


def show(data: Any, text: str, output_format: str) -> None:
    """Prints a result as text or as one JSON object."""
    typer.echo(json.dumps(data, indent=2, allow_nan=False) if output_format == "json" else text)
