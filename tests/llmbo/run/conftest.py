"""A real PostgreSQL, for what several processes do to one database."""

from collections.abc import Callable, Iterator

import pytest

from experiments.chaos.servers import PostgreSQL, postgresql


@pytest.fixture(scope="session")
def server() -> Iterator[PostgreSQL]:
    """Whoever stops it starts it again."""
    with postgresql() as started:
        yield started


@pytest.fixture(scope="session")
def new_postgresql(server: PostgreSQL) -> Callable[[], str]:
    """Makes an empty database and gives its URL."""
    return server.database
