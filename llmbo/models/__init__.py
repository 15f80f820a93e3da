"""Names -> loaded models and tokenizers: `loading` for what can be pruned, `checkpoints` for what was."""
