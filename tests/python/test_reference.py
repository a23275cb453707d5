"""The reference page is made from the options themselves."""

from pathlib import Path

from ntkcl.config import options
from ntkcl.reference import configuration_page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_the_page_in_the_repository_is_current() -> None:
    hint = "run: python -m ntkcl.reference > docs/configuration.md"
    assert PAGE.read_text() == configuration_page(), hint


def test_the_page_has_every_key() -> None:
    page = configuration_page()
    assert not [option.key for option in options() if f"| `{option.key}` |" not in page]
