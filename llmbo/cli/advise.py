"""`llmbo advise`: look over the advisor's shoulder."""

from pathlib import Path
from typing import Annotated

import typer

from llmbo.cli.common import EXIT_NO_ANSWER, one_line_errors, say
from llmbo.config.advisor import HOOKS
from llmbo.errors import ConfigError, unknown


def advise(
    run: Annotated[Path, typer.Argument(help="A run's folder, e.g. runs/llama.")],
    hook: Annotated[str, typer.Option(help="warm_start, propose or directions.")] = "propose",
    advisor: Annotated[str | None, typer.Option(help="Ask another one than the run's own.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the prompt and ask nobody.")] = False,
    storage: Annotated[str | None, typer.Option(help="Database URL, if the run has one of its own.")] = None,
) -> None:
    """Show the prompt for a run's present state, or ask once and show what would become of the answer.

    The run itself is not changed. Exits with 1 if nobody answered, with 4 if a reply by mail is awaited.

    Example: llmbo advise runs/llama --dry-run
    """
    with one_line_errors(interrupted="Interrupted. The run is as it was."):
        if hook not in HOOKS:
            raise ConfigError(f"--hook: {unknown('hook', hook, HOOKS)}")
        if hook == "filter":
            raise ConfigError("--hook filter reviews a round's candidates, which only a run makes: use another hook.")
        from llmbo.advisor.assemble import check_advisor
        from llmbo.display.console import Console
        from llmbo.display.progress import Display
        from llmbo.models.silence import silence_libraries
        from llmbo.run.preview import COUNT, reopened, shown_answer, shown_prompt, stored_config

        silence_libraries()
        config, facts, url = stored_config(run, storage, advisor)
        if not dry_run and config.advisor == "none":
            raise ConfigError("This run has no advisor: name one with --advisor, or look at the prompt with --dry-run.")
        if not dry_run:
            check_advisor(config)
        with (
            Display(Console(stderr=True), 1) as display,
            reopened(run, config, facts, url, display) as (session, trials, think),
        ):
            thinks = None if hook == "warm_start" else think  # the first design is made before it does
            question = session.question(hook, trials, COUNT, config.seed, outlook=thinks)
            if dry_run:
                say(shown_prompt(question))
                return
            consultation = session.advice.open(question.round, hook)
            answer = consultation.close(session.advisor.ask(question, consultation))
        exchanges = session.advice.exchanges()
        if answer.stopped and not answer and all(exchange.reply is None for exchange in exchanges):
            say(f"error: Nobody answered: {answer.stopped}.", err=True)
            raise typer.Exit(EXIT_NO_ANSWER)
        for exchange in exchanges:
            say(f"{exchange.reply or exchange.error}\n", err=True)
        for line in shown_answer(answer, session):
            say(line)
