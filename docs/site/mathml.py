"""Equations as MathML, made when the site is built.

Browsers draw MathML themselves: a page needs no script and no font from elsewhere, and reads the
same without a network. In the Markdown an equation is `$...$`, or `$$...$$` on lines of its own, as
GitHub draws it, too.
"""

import html
import re

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    """Called by MkDocs with the HTML of each page."""
    content = _INLINE.sub(lambda found: convert(html.unescape(found[1])), content)
    return _BLOCK.sub(
        lambda found: convert(html.unescape(found[1]).strip(), display="block"), content
    )
