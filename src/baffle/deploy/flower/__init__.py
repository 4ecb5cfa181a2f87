"""All that touches Flower's internals."""
