"""One run's life: its parts put together, its trials stored, its folder locked, its models rebuilt."""
