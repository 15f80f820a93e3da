"""An advisor reads importance statistics and past trials, and suggests where to look.

Data flows one way: `context` (what it reads) -> `render` (prompt text) -> a client (text in, text out) -> `parse` (text to
grid points and directions) -> `llm` (ask, bounded repair, give up) -> `proposer` (what a round does with the advice).
Advisors without a model (`offline`) skip the text. Every exchange is kept by `store`, censored, before its advice is used.
"""
