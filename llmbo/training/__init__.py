"""Short training of pruned models: recovery of one, and whether a front's order survives it."""
