from llmbo.cli import app

app()
