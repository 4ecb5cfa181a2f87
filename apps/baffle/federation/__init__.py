"""The app that trains: a few lines around the installed package ``baffle``."""
