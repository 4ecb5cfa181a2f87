"""PyTorch models, evaluated by forward passes under perturbed weights."""
