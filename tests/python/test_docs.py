"""The documentation site: complete, its links lead somewhere, its code compiles.

`make docs` builds it, which fails at what only the builder sees (anchors, docstrings).
"""

import ast
import inspect
import re
from pathlib import Path

import pytest

import ntkcl
import ntkcl.ops
from ntkcl.reference import preset_table

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SETTINGS = (DOCS / "site" / "mkdocs.yml").read_text()


def name(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


def test_the_navigation_has_every_page_once() -> None:
    # Protects: a page that nobody can find, a line that leads nowhere.
    navigation = SETTINGS.split("\nnav:\n")[1].split("\n\n")[0]
    assert sorted(re.findall(r"\S+\.md", navigation)) == sorted(map(name, PAGES))


def test_every_public_name_is_in_the_reference() -> None:
    named = re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(), re.M)
    assert sorted(named) == sorted(
        [*(f"ntkcl.{n}" for n in ntkcl.__all__), "ntkcl.ops", "ntkcl.optim"]
    )


@pytest.mark.parametrize("function", ntkcl.ops.__all__)
def test_every_operator_has_what_the_reference_shows(function: str) -> None:
    # Protects: the site shows the members of ntkcl.ops that have a docstring.
    described = getattr(ntkcl.ops, function)
    returns = inspect.signature(described).return_annotation is not None
    assert "Args:" in described.__doc__ and ("Returns:" in described.__doc__) == returns


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_stay_on_the_site(page: Path) -> None:
    # Protects: links to files that the repository has, but not the site.
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("#"):
            continue
        found = (page.parent / target.split("#")[0]).resolve()
        assert found.is_file() and found.is_relative_to(DOCS), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_compile(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.DOTALL):
        ast.parse(block)


@pytest.mark.parametrize("method", ["ntk-cl", "lorac-ipc", "raa"])
def test_the_page_of_a_method_has_its_presets(method: str) -> None:
    # Protects: settings and published numbers have one truth, ntkcl.presets.
    page = DOCS / "methods" / f"{method.replace('-', '_')}.md"
    hint = f"put what ntkcl.reference.preset_table({method!r}) gives into {name(page)}"
    assert preset_table(method) in page.read_text(), hint


@pytest.mark.parametrize("method", ntkcl.list_methods())
def test_every_method_has_a_page_with_its_repairs(method: str) -> None:
    # Protects: a repair that the configuration names by number, and no page explains.
    page = (DOCS / "methods" / f"{method.replace('-', '_')}.md").read_text()
    own = (DOCS / "configuration.md").read_text().split(f"\n## `{method}`\n")[-1].split("\n## ")[0]
    repairs = re.findall(rf"^\| `{method.replace('-', '_')}\.(\w+)` .* repair ([\d.]+)", own, re.M)
    for key, number in repairs:
        assert f"| {number} | `{key}` |" in page, (key, number)


def test_nothing_is_fetched_by_a_reader() -> None:
    # Protects: pages that read the same without a network, and tell nobody who reads them.
    assert "font: false" in SETTINGS
    for setting in ("extra_javascript", "mathjax", "katex", "analytics", "- offline"):
        assert setting not in SETTINGS
