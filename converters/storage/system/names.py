"""Names of files as other files give them:
they may not lead out of the folder they are for.

On Windows a backslash cuts a path as a slash does, and a colon follows a drive ("C:x"
lies in no folder that is put before it) or names a stream of a file. A device, such as
"nul", has its name in every folder and with every ending, and dots and blanks at the
end of a name are dropped.
"""

from __future__ import annotations

import os
import re

from converters.lazy_pattern import LazyPattern

FORBIDDEN = "/\0" + ("\\:" if os.name == "nt" else "")
_OF_WINDOWS = LazyPattern(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3]) *(\..*)?|.*[. ]",
    re.IGNORECASE | re.DOTALL,
)


def is_name(name: str) -> bool:
    """Whether a text is the name of one file in a folder, and of nothing elsewhere."""
    if name in ("", ".", "..") or any(character in name for character in FORBIDDEN):
        return False
    return "\\" not in FORBIDDEN or _OF_WINDOWS.fullmatch(name) is None
