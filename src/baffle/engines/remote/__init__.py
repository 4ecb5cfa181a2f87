"""Clients on other machines, over any transport."""
