"""What prints the figures of the docs; run from the repository's root with ``python -m bench...``."""
