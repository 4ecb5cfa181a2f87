"""The method's exact mathematics: it imports nothing of the package but its errors."""
