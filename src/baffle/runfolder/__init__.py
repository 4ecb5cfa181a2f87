"""The folder of a run: journal, configuration, metrics, snapshots, clients."""
