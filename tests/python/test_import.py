"""Importing the package: the versions it was built with, and what a wrong torch leads to."""

import re
import subprocess
import sys

import torch

import ntkcl
from ntkcl import _C, _build_info


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_a_different_torch_is_refused_by_both_names() -> None:
    result = run("import torch; torch.__version__ = '9.8.7'; import ntkcl")
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError: [ntkcl] expected torch ")
    assert _build_info.TORCH_VERSION in message
    assert "9.8.7" in message


def test_the_build_says_what_it_was_built_with() -> None:
    assert _C.build_info["torch"] == _build_info.TORCH_VERSION == torch.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", _C.build_info["opencv"])
    assert re.match(r"(on|off) \(.+\)$", _C.build_info["cuda"])


def test_the_process_has_one_cuda_runtime_and_one_openmp() -> None:
    # The toolkit's libcudart or a second libgomp beside torch's own would be used half and half.
    result = run("import ntkcl; print(open('/proc/self/maps').read())")
    for library in ("libcudart", "libgomp", "libc10.so"):
        paths = set(re.findall(rf"/\S*/{library}\S*", result.stdout))
        assert len(paths) <= 1, f"{library}: {sorted(paths)}"


def test_completion_shows_the_public_names_alone() -> None:
    assert set(dir(ntkcl)) == {*ntkcl.__all__, "__version__"}
    assert not hasattr(ntkcl, "ntkcl")
