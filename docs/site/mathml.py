"""Equations as MathML, made when the site is built.

Browsers draw MathML themselves: a page needs no script and no font from elsewhere, and reads the
same without a network. In the Markdown an equation is `$...$`, or `$$...$$` on lines of its own, as
GitHub draws it, too.
"""

import html
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    """Called by MkDocs with the HTML of each page."""
    content = _INLINE.sub(lambda found: _mathml(found[1], "inline"), content)
    return _BLOCK.sub(lambda found: _mathml(found[1], "block"), content)


def _mathml(escaped: str, display: str) -> str:
    source = html.unescape(escaped).strip()
    mathml = convert(source, display=display)
    if "\\" in mathml:  # a command that the converter does not know is left as it is
        raise PluginError(f"no MathML for a command in the equation {source}")
    return mathml
