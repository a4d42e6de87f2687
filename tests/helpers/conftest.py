"""The server of gs://, and connections to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.helpers.gcs_requests import Client
from tests.helpers.gcs_server import Server


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    made = Client(server.port)
    yield made
    made.connection.close()


@pytest.fixture
def connect() -> Iterator[Callable[..., Client]]:
    """More connections: `connect(port, timeout=30)`."""
    made: list[Client] = []

    def one(port: int, timeout: float = 30) -> Client:
        made.append(Client(port, timeout))
        return made[-1]

    yield one
    for client in made:
        client.connection.close()
