"""How it is searched: the loop, the surrogate and its acquisition, strategies and baselines, Pareto fronts and gains."""
