"""Strategies side by side on one problem: `llmbo compare`."""
