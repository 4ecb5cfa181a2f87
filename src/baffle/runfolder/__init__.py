"""The folder of a run: configuration, journal of rows, metrics, snapshots, clients."""
