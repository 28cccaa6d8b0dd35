"""What the commands share: options, JSON, and a bar of bytes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

CHECKPOINT = click.argument("checkpoint", type=click.Path(path_type=Path))
RUN = click.argument("run", type=click.Path(path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")


def facts_as_json(facts: Any) -> str:
    """Facts as text."""
    return json.dumps(facts, indent=2, ensure_ascii=False)


@contextmanager
def progress(total: int, name: str) -> Iterator[Callable[[int], Any]]:
    """A bar of bytes on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=name, unit="B", unit_scale=True, leave=False) as bar:
        yield bar.update
