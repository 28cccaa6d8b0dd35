"""Names without a tensor, as lines for a user: one line a kind, not one a module."""

from __future__ import annotations

from collections.abc import Mapping

MAX_LISTED = 3  # names of a kind that are listed


def lines(absent: Mapping[str, str]) -> list[str]:
    """The absent names with their reasons; many names of one reason share a line."""
    state_names = [name for name in absent if name.rpartition(".")[2] == "_extra_state"]
    state_entries = set(state_names) if len(state_names) > 1 else set()
    names_by_reason: dict[str, list[str]] = {}
    for name, reason in absent.items():
        if name not in state_entries:
            names_by_reason.setdefault(reason, []).append(name)

    messages = []
    for reason, names in names_by_reason.items():
        if len(names) <= MAX_LISTED:
            messages += [f"{name}: {reason}" for name in names]
        else:
            remainder = f" and {len(names) - MAX_LISTED} more"
            messages.append(
                f"{len(names)} names, {', '.join(names[:MAX_LISTED])}{remainder}: {reason}"
            )

    if state_entries:
        messages.append(
            f"{len(state_names)} entries _extra_state are not plain tensors ({state_names[0]}, ...)"
        )

    return messages
