"""Recovery: training that wins back what pruning cost (Adapt-Accel's second half)."""
