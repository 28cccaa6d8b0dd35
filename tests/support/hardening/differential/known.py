"""The documented differences as predicates: each names its row of docs/deepspeed-differences.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from hardening.differential.cases import Case
from hardening.differential.judging import Difference


@dataclass(frozen=True, slots=True)
class Known:
    """A documented difference: the text that its row in the page begins with, and when it holds."""

    row: str
    holds: Callable[[Case, Difference], bool]


KNOWN = (
    Known(
        "no ZeRO (stage 0)",
        lambda case, it: _theirs(it, "fails", "TypeError") and case.stage == 0,
    ),
    Known(
        "BF16_Optimizer",
        lambda case, it: (
            _theirs(it, "fails", "ValueError")
            and "is not a zero checkpoint" in it.detail
            and "data_types" in case.config
        ),
    ),
    Known(
        "legacy files",
        lambda case, it: (
            _theirs(it, "fails", "RuntimeError")
            and "mmap" in it.detail
            and "checkpoint" in case.config
        ),
    ),
    Known(
        "frozen parameters, stage 1",
        lambda case, it: _theirs(it, "lost") and case.stage == 1 and it.role == "frozen",
    ),
    Known(
        "parameters without elements, stage 1",
        lambda case, it: _theirs(it, "lost") and case.stage == 1 and it.numel == 0,
    ),
    Known(
        "two parameters without elements",
        lambda case, it: _theirs(it, "shape") and it.numel == 0 and it.role != "buffer",
    ),
    Known(
        "frozen parameters",
        lambda case, it: (
            _theirs(it, "dtype")
            and it.role == "frozen"
            and _only_type(it, torch.bfloat16, torch.float16)
        ),
    ),
    Known(
        "Other differences: floating-point buffers in fp64",
        lambda case, it: (
            _theirs(it, "dtype") and it.role == "buffer" and it.detail.endswith("torch.float64")
        ),
    ),
    Known(
        "parameters without elements, stages 2 and 3",
        lambda case, it: (
            _theirs(it, "dtype")
            and (case.stage >= 2 and it.numel == 0 and it.role in ("trained", "outside"))
            and _only_type(it, torch.bfloat16, torch.float16)
        ),
    ),
    Known(
        "parameters without elements, `exclude_frozen_parameters`",
        lambda case, it: (
            (it.numel, it.role, case.exclude_frozen) == (0, "trained", True)
            and case.stage > 1
            and (_theirs(it, "lost") or (case.stage == 3 and it.kind == "absent"))
        ),
    ),
    Known(
        "tied frozen parameters, `exclude_frozen_parameters`",
        lambda case, it: (
            (it.role, case.exclude_frozen) == ("frozen", True)
            and case.stage > 0
            and (_theirs(it, "lost") or (case.stage == 3 and it.kind == "absent"))
        ),
    ),
    Known(
        "trainable parameters in no param group, stages 1 to 3",
        lambda case, it: (
            it.role == "outside"
            and case.stage > 0
            and (_theirs(it, "lost") or (case.stage == 3 and it.kind == "absent"))
        ),
    ),
    Known(
        "a module under two names, or two names of a parameter in one module",
        lambda case, it: (
            _theirs(it, "lost")
            and case.stage > 0
            and (it.name.startswith("layers.9.") or _twice_in_one_module(case, it.name))
        ),
    ),
    Known(
        "no ZeRO, several fp32 tensors that round to the same 16-bit values",
        lambda case, it: (
            it.side == "ours"
            and it.kind == "fails"
            and case.stage == 0
            and "matches several 16-bit tensors equally well" in it.detail
        ),
    ),
    Known(
        "no ZeRO, param groups in another order than the module's",
        lambda case, it: (
            it.side == "ours"
            and it.kind == "fails"
            and case.stage == 0
            and case.order != "model"
            and "matches no 16-bit tensor in the order of its group" in it.detail
        ),
    ),
)


def _twice_in_one_module(case: Case, name: str) -> bool:
    owners = {
        spec.path: spec.owner if spec.owner >= 0 else index
        for index, spec in enumerate(case.parameters)
    }
    module = name.rpartition(".")[0]
    beside = [path for path in owners if path.rpartition(".")[0] == module]
    return name in owners and sum(owners[path] == owners[name] for path in beside) > 1


def _theirs(it: Difference, kind: str, *errors: str) -> bool:
    said = not errors or it.detail.split(":")[0] in errors
    return it.side == "theirs" and it.kind == kind and said


def _only_type(it: Difference, *kinds: torch.dtype) -> bool:
    return it.detail in {f"{kind}, not torch.float32" for kind in kinds}


def explained(case: Case, found: Iterable[Difference]) -> tuple[dict[str, int], list[Difference]]:
    """How many differences each row explains, and those that none does."""
    counts: dict[str, int] = {}
    left = []
    for it in found:
        row = next((known.row for known in KNOWN if known.holds(case, it)), None)
        if row is None:
            left.append(it)
        else:
            counts[row] = counts.get(row, 0) + 1
    return counts, left
