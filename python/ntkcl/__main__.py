"""`python -m ntkcl` is the command `ntkcl`."""

from ntkcl.cli import main

main()
