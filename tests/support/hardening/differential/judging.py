"""What we make of a checkpoint, what DeepSpeed makes of it, and how either differs from the truth.

The truth is the live engine's: ``live.pt`` (see ``training``). Without DeepSpeed in this process
but for ``theirs``, which is to be called in one of its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from oracles import raised, same, weights_in

from ckpt.weights.conversion import convert
from converters.errors import CheckpointError
from hardening.differential.cases import Case

Tensors = dict[str, torch.Tensor]
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not alike: ``side`` is whose it is, "ours" or "theirs".

    ``kind``: fails, absent (and said so), lost, extra, shape, dtype, values; ``name`` a tensor's.
    ``role`` says what that is in the live model: trained, frozen, outside (trainable, but not
    optimized), buffer or ?; ``numel`` its size, ``detail`` the rest.
    """

    side: str
    kind: str
    name: str = ""
    role: str = "?"
    numel: int = -1
    detail: str = ""

    def __str__(self) -> str:
        what = f"{self.name} ({self.role}, {self.numel} elements)" if self.name else ""
        return " ".join(f"{self.side}: {self.kind} {what} {self.detail}".split())


@dataclass(frozen=True, slots=True)
class Truth:
    """What the live engine held, and what follows for a conversion to fp32."""

    masters: Tensors
    weights: Tensors
    buffers: Tensors
    names: list[list[str]]
    roles: dict[str, str]

    @classmethod
    def read(cls, case: Case, path: Path) -> Truth:
        """Tied names have the role of that name of them which the case knows."""
        found: dict[str, Any] = torch.load(path, weights_only=True)
        specs = {spec.path: spec for spec in case.parameters}
        roles = dict.fromkeys(found["buffers"], "buffer")
        for names in found["names"]:
            spec = next(specs[name] for name in names if name in specs)
            role = "frozen" if not spec.trained else "trained" if spec.group >= 0 else "outside"
            roles |= dict.fromkeys(names, role)
        return cls(**found, roles=roles)

    def role(self, name: str) -> str:
        """What a tensor is."""
        return self.roles.get(name, "?")

    def expected(self, case: Case) -> Tensors:
        """By name, what a conversion to fp32 is to give.

        exclude_frozen_parameters leaves out the first name of each frozen parameter, no others.
        """
        first = {names[0] for names in self.names if case.exclude_frozen}
        kept = {
            name: value
            for name, value in self.weights.items()
            if name not in first or self.role(name) != "frozen"
        }
        return {k: raised(v) for k, v in (kept | self.buffers | self.masters).items()}


def theirs(save: Path, out: Path) -> None:
    """DeepSpeed's state dict, or why there is none, as ``out``."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    found: Any
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            read = get_fp32_state_dict_from_zero_checkpoint(str(save))
        found = {name: value.detach().clone() for name, value in read.items()}
    except Exception as error:  # it raises whatever it trips over
        found = f"{type(error).__name__}: {error}"
    torch.save(found, out)


def differences(case: Case, folder: Path) -> list[Difference]:
    """All of ours and of theirs against the live values: where ours is those, theirs is ours."""
    truth = Truth.read(case, folder / "live.pt")
    try:
        ours = list(_ours(case, truth, folder))
    except CheckpointError as error:
        ours = [Difference("ours", "fails", detail=str(error))]
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        said = f"{where} {type(error).__name__}: {error}"
        ours = [Difference("ours", "traceback", detail=said)]
    read: Tensors | str = torch.load(folder / "theirs.pt", weights_only=True)
    if isinstance(read, str):
        return [*ours, Difference("theirs", "fails", detail=read)]
    return [*ours, *_unlike("theirs", truth, read, truth.expected(case))]


def _ours(case: Case, truth: Truth, folder: Path) -> Iterator[Difference]:
    expected = truth.expected(case)
    found, record = _converted(case, folder, "fp32")
    for name, reason in record["absent"].items():
        numel = expected.pop(name).numel() if name in expected else -1
        yield Difference("ours", "absent", name, truth.role(name), numel, reason)
    yield from _unlike("ours", truth, found, expected)
    low = LOW.get(case.dtype)
    if low is not None:
        found, _ = _converted(case, folder, case.dtype)
        weights = {name: truth.weights[name] for name in expected if name in truth.weights}
        kept = {name: value for name, value in found.items() if name not in truth.buffers}
        yield from _unlike("ours", truth, kept, {k: v.to(low) for k, v in weights.items()})


def _converted(case: Case, folder: Path, dtype: str) -> tuple[Tensors, dict[str, Any]]:
    """By every name, as ``ckpt`` with the case's options has it."""
    output = folder / f"model-{dtype}"
    prepared = convert.prepare(folder / "save", output, dtype=dtype, **dict(case.options))
    convert.run(prepared)
    found = weights_in(output)
    record = json.loads((output / "conversion.json").read_text())
    for name, owner in record["aliases"].items():
        if dict(case.options)["tied"] == "drop":
            found.setdefault(name, found[owner])
    shutil.rmtree(output)
    return found, record


def _unlike(side: str, truth: Truth, found: Tensors, expected: Tensors) -> Iterator[Difference]:
    for name in sorted(found.keys() | expected.keys()):
        told: dict[str, Any] = {"name": name, "role": truth.role(name)}
        if name not in expected:
            yield Difference(side, "extra", **told)
            continue
        right = expected[name]
        told["numel"] = right.numel()
        if name not in found:
            yield Difference(side, "lost", **told)
            continue
        value = found[name]
        if value.shape != right.shape:
            shapes = f"{list(value.shape)}, live {list(right.shape)}"
            yield Difference(side, "shape", **told, detail=shapes)
        elif value.dtype != right.dtype:
            alike = same(value.to(right.dtype), right) or same(right.to(value.dtype), value)
            detail = f"{value.dtype}, not {right.dtype}{'' if alike else ', other values'}"
            yield Difference(side, "dtype", **told, detail=detail)
        elif not same(value, right):
            count = int((value != right).sum())
            yield Difference(side, "values", **told, detail=f"{count} of {right.numel()}")
