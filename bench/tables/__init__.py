"""The tables of the docs, one module each."""
