"""A client: it answers tasks with integers, from forward passes only."""
