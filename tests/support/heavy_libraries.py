"""Libraries that take seconds to import: their first use imports them, and not the collection.

    from heavy_libraries import peft, transformers

    config = transformers.LlamaConfig()

Each process of xdist imports all test modules, but runs the tests of some. Nothing that a test
module does when it is imported may use one: parametrise by names and lambdas.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest.mock import patch


class LateModule:
    """Stands for a module, which is imported when an attribute of it is read, set or deleted.

    It has no attributes that begin with an underscore: pytest asks each value of a test module for
    several, such as ``__test__``.
    """

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def _module(self) -> ModuleType:
        name = object.__getattribute__(self, "_name")
        return sys.modules.get(name) or import_without_gc(name)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_") and attribute != "__version__":
            raise AttributeError(attribute)

        return getattr(self._module(), attribute)

    def __setattr__(self, attribute: str, value: object) -> None:
        setattr(self._module(), attribute, value)

    def __delattr__(self, attribute: str) -> None:
        delattr(self._module(), attribute)


def import_without_gc(name: str) -> ModuleType:
    """Imports a module; the garbage collector does not look at what stays for ever.

    Nor is torch's compiler imported, 1.4 s, by bitsandbytes, which decorates functions with it.
    """
    gc.disable()
    try:
        with patch.dict(os.environ, {"TORCHDYNAMO_DISABLE": "1"}):
            return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


if TYPE_CHECKING:
    import peft as peft
    import transformers as transformers
else:
    peft = LateModule("peft")
    transformers = LateModule("transformers")
