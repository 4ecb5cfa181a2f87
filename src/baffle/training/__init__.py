"""Training: the loop, the short way in, the baseline by backpropagation."""
