"""Rules for every file of the repository, whatever it holds."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

TOP_LEVEL = {
    ".ci",
    ".clang-format",
    ".clang-tidy",
    ".gitattributes",
    ".gitignore",
    "CHANGELOG.md",
    "CMakeLists.txt",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "_build_backend",
    "benchmarks",
    "csrc",
    "docs",
    "examples",
    "notebooks",
    "pyproject.toml",
    "python",
    "tests",
}
BINARY_SUFFIXES = {".gif", ".jpg", ".npy", ".npz", ".png", ".safetensors", ".zip"}


def tracked_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def text_files() -> list[Path]:
    return [path for path in tracked_files() if path.suffix not in BINARY_SUFFIXES]


def test_the_top_level_is_the_house_of_contributing() -> None:
    top = {path.relative_to(ROOT).parts[0] for path in tracked_files()}
    assert top <= TOP_LEVEL, f"new at the top level: {sorted(top - TOP_LEVEL)}"


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    place = re.compile(r"(?<![\w.~])/(?:home|root|work|Users|tmp|var/tmp)/\w")
    wrong = [
        f"{path.relative_to(ROOT)}: {found[0]}"
        for path in text_files()
        if path.resolve() != Path(__file__).resolve()
        and (found := place.search(path.read_text(encoding="utf-8")))
    ]
    assert not wrong


def test_text_is_utf8_with_unix_lines_and_a_last_newline() -> None:
    for path in text_files():
        content = path.read_bytes()
        content.decode("utf-8")
        assert b"\r" not in content or path.suffix == ".ipynb", path
        assert not content or content.endswith(b"\n"), f"{path}: no newline at the end"


def test_no_line_of_source_is_longer_than_100_columns() -> None:
    # clang-format does not break comments, ruff does not read the rest.
    suffixes = {".cpp", ".cu", ".cuh", ".h", ".py"}
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in text_files()
        if path.suffix in suffixes and path.name != "_C.pyi"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if len(line) > 100
    ]
    assert not long


def test_no_file_of_mixed_leftovers() -> None:
    leftovers = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert not [path for path in tracked_files() if path.stem in leftovers]


def calls(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            names.add(ast.unparse(node.func))
    return names


def test_the_package_executes_nothing_that_it_loads() -> None:
    # Data sets, weights and checkpoints come from strangers; pickle would run their code.
    forbidden = {"pickle.load", "pickle.loads", "torch.load", "eval", "exec", "joblib.load"}
    for path in (ROOT / "python").rglob("*.py"):
        used = calls(path) & forbidden
        assert not used, f"{path.relative_to(ROOT)} calls {sorted(used)}"


def test_the_licence_is_mit_everywhere() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License")
    assert 'license = "MIT"' in (ROOT / "pyproject.toml").read_text()


def test_one_version() -> None:
    pyproject = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    cmake = re.search(r"project\(ntkcl VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text())
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert pyproject and cmake
    assert pyproject[1] == cmake[1]
    assert f"## [{cmake[1]}]" in changelog or "## [Unreleased]" in changelog


def test_links_of_the_documents_lead_somewhere() -> None:
    broken = []
    for path in tracked_files():
        if path.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            if "://" in target or target.startswith(("#", "mailto:")):
                continue
            if not (path.parent / target.split("#")[0]).exists():
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert not broken
