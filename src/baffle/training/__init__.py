"""Training: the loop, ``fit`` as the shortest way to it, and the backpropagation baseline."""
