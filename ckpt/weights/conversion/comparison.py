"""The proofs for the tensors of an output, by CRC32s and copies, and words for them."""

from __future__ import annotations

from collections.abc import Iterator

from ckpt.results import WeightChecks
from ckpt.weights.output.product import COPIES, Product
from converters.execute.shards import MoveReport
from converters.plan import Plan
from converters.source import MASTERS, STATES
from converters.words import counted, verb


def checks(product: Product, plan: Plan, report: MoveReport) -> WeightChecks:
    """The proofs that were made when the bytes of ``plan`` were moved or served, as
    ``report`` has them.

    ``uncompared_tensors`` are parameters without a copy, ``uncompared_buffers`` counts
    other tensors without one; ``without_copy`` counts the parameters that only the
    optimizer's files have. Bytes are counted as they are read: of all tensors, and of
    those that were compared.
    """
    different = set(report.unlike)
    aliases, buffers = product.weights.aliases, product.weights.buffers
    trained = product.weights.trained
    compared = total = equal_bytes = 0
    parameters, other_names = [], []
    for placement in plan.placements():
        total += placement.source.nbytes
        name = aliases.get(placement.name, placement.name)
        if placement.copies:
            compared += placement.name not in different
            equal_bytes += 0 if placement.name in different else placement.source.nbytes
        elif name in buffers or not placement.source.dtype.floating:
            other_names.append(placement.name)
        else:
            parameters.append(placement.name)

    return WeightChecks(
        verified=True,
        crc32_bytes=report.checked,
        no_crc32_bytes=report.unchecked,
        source_bytes=total,
        compared_with=product.proof,
        compared_tensors=compared,
        compared_bytes=equal_bytes,
        uncompared_tensors=tuple(parameters),
        uncompared_buffers=len(other_names),
        without_copy=sum(aliases.get(name, name) in trained for name in parameters),
        unlike_tensors=tuple(report.unlike),
        nan=report.nan,
        inf=report.inf,
    )


def words(checks: WeightChecks) -> tuple[str | None, list[str]]:
    """The proofs by copies, and what they leave open, in words for a user."""
    against, equal = checks.compared_with, checks.compared_tensors or 0
    if not against:
        return None, ["no 16-bit copy to compare with"]

    parameters, buffers = len(checks.uncompared_tensors), checks.uncompared_buffers or 0
    mismatched = len(checks.unlike_tensors)
    open_points = []
    if mismatched:
        open_points.append(_difference(against, mismatched))
    if not equal and not mismatched:
        if against in (STATES, COPIES, MASTERS):
            return None, [*open_points, "no 16-bit copy to compare with"]
        return None, [f"{against} has none of these tensors under the same name and shape"]

    open_points += _uncompared(checks, against)
    all_tensors = equal + mismatched + parameters + buffers
    if equal == all_tensors:
        return f"{counted(equal, 'tensor')} equal to {against}", open_points
    if not equal:
        return None, open_points

    equal_bytes, all_bytes = checks.compared_bytes or 0, checks.source_bytes or 0
    share = 100 * equal_bytes / max(all_bytes, 1)
    if equal_bytes < all_bytes:
        share = min(share, 99.9)  # all but a few bytes are not all
    digits = 0 if share < 99.5 else 1
    part = f"{equal} of {all_tensors} tensors ({share:.{digits}f} % of bytes)"

    return f"{part} equal to {against}", open_points


def _uncompared(checks: WeightChecks, against: str) -> Iterator[str]:
    """Which tensors were not compared, and why."""
    without = (checks.without_copy or 0) if against == STATES else 0
    if without:
        are = verb(without, "is", "are")
        yield f"{counted(without, 'tensor')} {are} not there, but in the optimizer's files"

    remaining = len(checks.uncompared_tensors) - without
    if remaining:
        yield f"{counted(remaining, 'tensor')} {_why_uncompared(remaining, against)}"

    buffers = checks.uncompared_buffers
    if buffers:
        yield f"{counted(buffers, 'buffer')} {verb(buffers, 'is', 'are')} not compared"


def _why_uncompared(number: int, against: str) -> str:
    have = verb(number, "has", "have")
    if against == STATES:
        return verb(number, "lies there only", "lie there only")
    if against in (COPIES, MASTERS):
        return f"{have} no copy"
    return f"{have} another layout there"


def _difference(against: str, number: int) -> str:
    count, do = counted(number, "tensor"), verb(number, "does", "do")
    if against == COPIES:
        return (
            f"{count} of the base {do} not round to the checkpoint's frozen copy, so "
            "the base is another revision of the one trained on, or was rounded to "
            "another type"
        )

    if against == MASTERS:
        return (
            f"{count} {verb(number, 'is', 'are')} not {MASTERS}, so the file of 16-bit "
            "weights is of another step or was changed"
        )

    return f"{against} has other values of {count}, so it is of another step"
