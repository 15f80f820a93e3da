"""Models, dense and pruned, measured alike: perplexity, benchmark tasks, tables."""
