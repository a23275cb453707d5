"""
ntkcl's C++ core. Use the functions of the package `ntkcl`.
"""

from __future__ import annotations

__all__: list[str] = ["build_info"]
__version__: str
build_info: dict
