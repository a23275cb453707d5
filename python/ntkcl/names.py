"""What messages say: the name that was most likely meant, a value in short, what to do where a file
is missing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


def shown(value: Any) -> str:
    """A value as Python writes it, shortened."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@contextmanager
def if_missing(hint: str) -> Iterator[None]:
    """Adds to an error about a missing file what can be done."""
    try:
        yield
    except FileNotFoundError as error:
        error.add_note(hint)
        raise


def nearest(word: str, known: Iterable[str]) -> str | None:
    """By the part after the dot ("eta"), by initials ("lr"), by its beginning, by spelling; None
    where nothing is near."""
    names = list(known)
    plain = word.replace("-", "_").lower()
    section, _, last = plain.rpartition(".")
    if any(name.startswith(f"{section}.") for name in names):  # also a key that stands in none
        inside = {name.removeprefix(f"{section}."): name for name in names}
        near = nearest(last, [name for name in inside if "." not in name])
        if near:
            return inside[near]
    lasts = {name.rpartition(".")[2]: name for name in reversed(names)}
    if plain in lasts:
        return lasts[plain]
    for last, name in lasts.items():
        initials = "".join(part[:1] for part in last.split("_"))
        if len(initials) > 1 and plain == initials:
            return name
    for name in names:
        if name.startswith(word) and len(word) > 3:
            return name
    close = difflib.get_close_matches(plain, [*names, *lasts], n=1) or difflib.get_close_matches(
        word, names, n=1
    )
    return lasts.get(close[0], close[0]) if close else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?", or nothing."""
    near = nearest(word, known)
    return f"; did you mean '{near}'?" if near else ""
