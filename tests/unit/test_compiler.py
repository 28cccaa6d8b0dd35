"""The C++ compiler of the tests: what two extensions of DeepSpeed share is compiled once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from extensions import COMPILER

COMPILING = """#!/usr/bin/env bash
echo call >>"$CALLS"
for object; do [[ $object == *.o ]] && break; done
echo compiled >"$object"
echo "$object: $SOURCE" >"$object.d"
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a script of bash")


def test_a_file_of_two_extensions_is_compiled_once_until_it_changes(tmp_path: Path) -> None:
    compiler, calls, source = tmp_path / "bin/c++", tmp_path / "calls", tmp_path / "a.cpp"
    compiler.parent.mkdir()
    compiler.write_text(COMPILING)
    compiler.chmod(0o755)
    variables = {
        "PATH": f"{compiler.parent}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "SOURCE": str(source),
    }

    def compile_in(extension: str, option: str = "-O3") -> int:
        """How often the real compiler has been called by then."""
        folder = tmp_path / "build" / extension
        folder.mkdir(parents=True, exist_ok=True)
        command = [COMPILER, "-MMD", "-MF", "a.o.d", f"-DTORCH_EXTENSION_NAME={extension}"]
        command += [option, "-c", source, "-o", "a.o"]
        subprocess.run(command, cwd=folder, env=os.environ | variables, check=True, timeout=60)
        assert (folder / "a.o").read_text() == "compiled\n"
        assert (folder / "a.o.d").read_text() == f"a.o: {source}\n"
        return calls.read_text().count("call")

    source.write_text("int a;")
    os.utime(source, (1, 1))
    assert compile_in("one") == 1
    assert compile_in("two") == 1
    assert compile_in("three", "-O2") == 2
    source.write_text("PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {}")  # each its own
    os.utime(source, (1, 1))
    assert compile_in("four") == 3
    source.write_text("int b;")
    os.utime(source, (2**32 - 1, 2**32 - 1))  # newer than what was compiled
    assert compile_in("five") == 4
