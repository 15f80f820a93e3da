"""Short training: recovery of a pruned model, whether a front's order survives it, and one adapter for all sub-networks before a search."""
