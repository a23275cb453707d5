"""The house stands as CONTRIBUTING draws it: floors, includes, and one list of sources."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CORE = CSRC / "ntkcl"

# From the ground up. A folder includes only from floors below its own.
FLOORS = [
    {"core"},
    {"kernels"},
    {"ops"},
    {"nn", "data", "scenario", "optim", "stats", "dist"},
    {"methods"},
    {"train", "analysis"},
    {"bindings"},
]
LEVEL = {folder: level for level, floor in enumerate(FLOORS) for folder in floor}
SOURCE_SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}


def sources() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.suffix in SOURCE_SUFFIXES)


def folder_of(path: Path) -> str:
    parts = path.relative_to(CSRC).parts
    return parts[1] if parts[0] == "ntkcl" else parts[0]


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def own_includes(path: Path) -> list[Path]:
    return [CSRC / name for name in includes(path) if name.startswith("ntkcl/")]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_folder_stands_on_a_floor() -> None:
    folders = {folder_of(path) for path in sources()}
    assert folders <= set(LEVEL), f"without a floor: {sorted(folders - set(LEVEL))}"


def test_our_headers_are_included_by_their_full_path_and_exist() -> None:
    missing = [
        f"{relative(path)} includes {name.relative_to(CSRC)}"
        for path in sources()
        for name in own_includes(path)
        if not name.is_file()
    ]
    assert not missing
    # Outside the bindings, which have one header beside their files, no include is relative.
    relative_includes = [
        f"{relative(path)} includes {name}"
        for path in sources()
        if folder_of(path) != "bindings"
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE)
        if not name.startswith("ntkcl/")
    ]
    assert not relative_includes


def test_includes_point_down() -> None:
    wrong = []
    for path in sources():
        folder = folder_of(path)
        for header in own_includes(path):
            target = folder_of(header)
            if target != folder and LEVEL[target] >= LEVEL[folder]:
                wrong.append(f"{relative(path)} ({folder}) includes {relative(header)} ({target})")
    assert not wrong


def test_core_and_kernels_know_no_torch() -> None:
    wrong = [
        f"{relative(path)} includes {name}"
        for path in sources()
        if folder_of(path) in ("core", "kernels")
        for name in includes(path)
        if name.split("/")[0] in ("torch", "ATen", "c10")
    ]
    assert not wrong


def test_only_the_bindings_know_python() -> None:
    wrong = [
        f"{relative(path)} includes {name}"
        for path in sources()
        if folder_of(path) != "bindings"
        for name in includes(path)
        if name.startswith(("pybind11/", "Python.h", "torch/csrc/utils/pybind"))
    ]
    assert not wrong


def test_heavy_torch_headers_are_not_used() -> None:
    # Each costs 13 to 26 s of compile time; ATen/ATen.h and torch/library.h cost 5.
    heavy = {"torch/extension.h", "torch/torch.h", "torch/nn.h", "torch/all.h"}
    wrong = [
        f"{relative(path)} includes {name}"
        for path in sources()
        for name in includes(path)
        if name in heavy
    ]
    assert not wrong


def test_headers_include_each_other_without_a_circle() -> None:
    done: set[Path] = set()

    def visit(path: Path, trail: list[Path]) -> None:
        assert path not in trail, " -> ".join(relative(step) for step in [*trail, path])
        if path in done:
            return
        for header in own_includes(path):
            visit(header, [*trail, path])
        done.add(path)

    for path in sources():
        visit(path, [])


def test_a_method_does_not_include_another_method() -> None:
    methods = CORE / "methods"
    wrong = []
    for path in sources():
        if methods not in path.parents or path.parent == methods:
            continue
        own = path.relative_to(methods).parts[0]
        for header in own_includes(path):
            if methods in header.parents and header.parent != methods:
                other = header.relative_to(methods).parts[0]
                if other != own:
                    wrong.append(f"{relative(path)} includes {relative(header)}")
    assert not wrong


def test_headers_are_guarded() -> None:
    headers = [path for path in sources() if path.suffix in (".h", ".cuh")]
    assert not [relative(path) for path in headers if "#pragma once" not in path.read_text()]


# ---- csrc/CMakeLists.txt -------------------------------------------------------------------------


def cmake_list(name: str) -> list[str]:
    text = (CSRC / "CMakeLists.txt").read_text()
    found = re.search(rf"^set\({name}\s(.*?)\)", text, re.MULTILINE | re.DOTALL)
    assert found, f"csrc/CMakeLists.txt sets no {name}"
    return found[1].split()


SOURCE_LISTS = [
    "NTKCL_SOURCES",
    "NTKCL_CUDA_SOURCES",
    "NTKCL_NO_CUDA_SOURCES",
    "NTKCL_DISTRIBUTED_SOURCES",
    "NTKCL_NO_DISTRIBUTED_SOURCES",
    "NTKCL_BINDINGS",
]


@pytest.mark.parametrize("name", SOURCE_LISTS)
def test_sources_are_listed_alphabetically(name: str) -> None:
    assert cmake_list(name) == sorted(cmake_list(name))


def test_every_source_is_listed_once() -> None:
    listed = [name for group in SOURCE_LISTS for name in cmake_list(group)]
    on_disk = [
        path.relative_to(CSRC).as_posix() for path in sources() if path.suffix in (".cpp", ".cu")
    ]
    assert sorted(listed) == on_disk


def test_cuda_files_are_built_with_cuda_only() -> None:
    for name in [*cmake_list("NTKCL_SOURCES"), *cmake_list("NTKCL_NO_CUDA_SOURCES")]:
        assert not name.endswith(".cu"), f"{name} is compiled without CUDA"
        text = (CSRC / name).read_text()
        assert not re.search(r'#include\s*[<"](cuda|ATen/cuda|c10/cuda)', text), name


def test_every_operator_has_a_stub_for_builds_without_cuda() -> None:
    def text(name: str) -> str:
        return (CSRC / name).read_text()

    fronts = [name for name in cmake_list("NTKCL_CUDA_SOURCES") if name.endswith(".cpp")]
    registered = {op for name in fronts for op in re.findall(r'm\.impl\("(\w+)"', text(name))}
    stubs = {
        op
        for name in cmake_list("NTKCL_NO_CUDA_SOURCES")
        for op in re.findall(r'"(\w+)"', text(name).partition("TORCH_LIBRARY_IMPL")[2])
    }
    # Made of torch's operators, with or without CUDA kernels of ours.
    portable = {
        op
        for name in cmake_list("NTKCL_SOURCES")
        for block in re.findall(
            r"LIBRARY_IMPL\(ntkcl, CUDA, m\) \{(.*?)\n\}", text(name), re.DOTALL
        )
        for op in re.findall(r'm\.impl\("(\w+)"', block)
    }
    defined = set(re.findall(r'm\.def\(\s*"(\w+)\(', text("ntkcl/ops/schema.cpp")))
    assert registered | portable == defined
    assert stubs == registered


# ---- CONTRIBUTING.md -----------------------------------------------------------------------------


def test_contributing_draws_these_floors() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    picture = re.search(r"^## The floors$.*?^```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert picture, "CONTRIBUTING.md has no picture under '## The floors'"
    lines = [re.split(r"\s{2,}", line.strip())[0] for line in picture[1].splitlines()]
    drawn = [{name.strip() for name in line.split(",")} for line in lines if line]
    assert drawn[0] == {"python"}, "Python is the top floor"
    assert drawn[:0:-1] == FLOORS
