"""``python -m baffle``: the command line."""

from baffle.cli import main

main()
