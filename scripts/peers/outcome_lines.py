"""A plugin of pytest: writes each outcome at once, so that a run that is stopped leaves them.

``PEERS_OUTCOMES`` is the file, of JSON lines: name, outcome, and of a failure the message.
"""

from __future__ import annotations

import json
import os
from typing import Any


def pytest_runtest_logreport(report: Any) -> None:
    """Writes what a test came to: its call, or what of its fixtures did not pass."""
    if report.when != "call" and report.outcome == "passed":
        return

    crash = getattr(report.longrepr, "reprcrash", None)
    message = crash.message if crash is not None else str(report.longrepr or "")
    line = {"name": report.nodeid, "outcome": report.outcome}
    if report.outcome == "failed":
        line["message"] = " ".join(message.split())[:160]
    with open(os.environ["PEERS_OUTCOMES"], "a") as file:
        file.write(json.dumps(line) + "\n")
