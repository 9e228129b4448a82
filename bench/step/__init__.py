"""`bn-bench step`: the training step of a whole residual network."""
