"""Harmless objects of the standard library in a client_state are read as inert records."""

from __future__ import annotations

import asyncio
import inspect
import os
import platform
import shutil
import socket
import ssl
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.pickles import denylist
from converters.pickles.values import Call
from converters.torch_files import reader


def _function(a: int, b: str = "b") -> None:
    """Its signature is pickled."""


SIGNATURE = inspect.signature(_function)
HARMLESS = {
    "platform.uname": platform.uname(),
    "os.uname": os.uname(),
    "inspect.signature": SIGNATURE,
    "inspect.Parameter": SIGNATURE.parameters["a"],
    "bound arguments": SIGNATURE.bind(1),
    "inspect.getfullargspec": inspect.getfullargspec(_function),
    "os.stat": os.stat("/"),
    "os.statvfs": os.statvfs("/"),
    "os.times": os.times(),
    "os.terminal_size": os.terminal_size((80, 24)),
    "subprocess.run": subprocess.CompletedProcess(["true"], 0, b"", b""),
    "CalledProcessError": subprocess.CalledProcessError(1, "true"),
    "TimeoutExpired": subprocess.TimeoutExpired("true", 1),
    "socket.AF_INET": socket.AF_INET,
    "socket.gaierror": socket.gaierror(1, "no name"),
    "ssl.TLSVersion": ssl.TLSVersion.TLSv1_2,
    "shutil.SameFileError": shutil.SameFileError("x"),
    "zipfile.ZipInfo": zipfile.ZipInfo("x"),
    "tarfile.TarInfo": tarfile.TarInfo("x"),
    "asyncio.CancelledError": asyncio.CancelledError(),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("value", HARMLESS.values(), ids=list(HARMLESS))
def test_they_are_read_as_records(value: Any, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"it": value, "step": 3}, path, pickle_protocol=protocol)
    root = reader.read(path).root
    assert isinstance(root["it"], Call) and root["step"] == 3


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("platform", "popen"),
        ("platform", "_syscmd_ver"),
        ("platform", "uname_result.__init__.__globals__"),
        ("inspect", "getsource"),
        ("inspect", "Signature.from_callable.__globals__"),
        ("subprocess", "run"),
        ("subprocess", "Popen"),
        ("subprocess", "os.SomeError"),
        ("commands", "getoutput"),
        ("posix", "system"),
        ("socket", "socket"),
        ("pickle", "loads"),
        ("torch.utils.collect_env", "run"),
        ("importlib.metadata", "import_module"),
        ("antigravity", "FlyError"),
    ],
)
def test_what_stands_beside_them_is_still_refused(module: str, name: str) -> None:
    assert denylist.runs_code(module, name)


def test_a_call_that_runs_code_is_refused_beside_harmless_ones(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return os.system, ("true",)

    path = tmp_path / "x.pt"
    torch.save({"uname": platform.uname(), "it": Hostile()}, path)
    with pytest.raises(Exception, match=r"asks for posix\.system, which would run code"):
        reader.read(path)
