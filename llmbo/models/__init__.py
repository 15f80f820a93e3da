"""Names -> loaded models and tokenizers, or one line that says why not."""
