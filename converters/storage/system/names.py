"""Names of files as other files give them:
they may not lead out of the folder they are for.

On Windows a backslash cuts a path as a slash does, and a colon follows a drive ("C:x"
lies in no folder that is put before it) or names a stream of a file.
"""

from __future__ import annotations

import os

FORBIDDEN = "/\0" + ("\\:" if os.name == "nt" else "")


def is_name(name: str) -> bool:
    """Whether a text is the name of one file in a folder, and of nothing elsewhere."""
    return name not in ("", ".", "..") and not any(character in name for character in FORBIDDEN)
