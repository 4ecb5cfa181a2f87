"""Clients: they answer tasks with integers, from forward passes only."""
