"""Programs to run with `python -m` or torchrun."""
