"""Search for the Pareto front of smaller models inside a pretrained decoder LLM."""

__version__ = "0.1.0"
