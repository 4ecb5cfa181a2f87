"""Speed and memory against the references: ``python -m bench.performance`` (``make bench``)."""
