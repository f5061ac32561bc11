"""Two instances behind a real proxy are restarted one after the other, under load."""

import contextlib
import random
import shlex
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.service_process import eventually, serving

from load import MIXED, Result, load
from proxies import proxy

RESTARTS = 10
#: The least number of requests behind each proxy.
REQUESTS = 50_000
STOCK_CONFIGURATION = Path(__file__).with_name("stock_gunicorn.conf.py")
STOCK = {"GUNICORN_CMD_ARGS": f"--config {shlex.quote(str(STOCK_CONFIGURATION))}"}


def lasting_port() -> int:
    """Return a free port outside the range of outgoing connections.

    It stays free while its server restarts.
    """
    while True:
        port = random.randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


class Instance:
    """One instance of the service, which keeps its port when it restarts."""

    def __init__(self, settings: dict[str, str]) -> None:
        self.port = lasting_port()
        self.settings = settings
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> "Instance":
        self.service = self.stack.enter_context(
            serving("tests.fault_routes:app", self.port, **self.settings)
        )
        self.service.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def restart(self) -> None:
        """Stop as a platform does, start again, and wait for a request from the proxy."""
        assert self.service.stop() == 0, self.service.text
        self.stack.close()
        self.__enter__()
        eventually(lambda: "/payments" in self.service.text)


def roll(name: str, settings: dict[str, str], is_enough: Callable[[int, Result], object]) -> Result:
    """Restart two instances behind a proxy in turn, under load, until it is enough.

    `is_enough` gets the number of restarts and the result so far.
    """
    port = lasting_port()
    instances = (Instance(settings), Instance(settings))
    one, other = instances
    restarts = 0
    with one, other, proxy(name, port, (one.port, other.port)), load(port, MIXED) as result:
        while not is_enough(restarts, result):
            instances[restarts % 2].restart()
            restarts += 1
    print(f"{restarts} restarts behind {name}: {result}")
    return result


def is_long_enough(restarts: int, result: Result) -> bool:
    """Return whether there were enough restarts and requests to trust the result."""
    return restarts >= RESTARTS and result.total >= REQUESTS


def has_failed(restarts: int, result: Result) -> bool:
    """Return whether a request has failed, or there is no hope that one will."""
    return restarts >= 3 * RESTARTS or bool(result.failures)


@pytest.mark.parametrize("name", ["nginx", "haproxy"])
def test_rolling_restarts_lose_no_request(name: str, urls: dict[str, str]) -> None:
    settings = {"DRAIN_SECONDS": "3", "RETIRE_SECONDS": "2", **urls}
    result = roll(name, settings, is_long_enough)
    assert result.failures == [], str(result)


@pytest.mark.parametrize("name", ["nginx", "haproxy"])
def test_rolling_restarts_of_the_stock_worker_lose_some(name: str, urls: dict[str, str]) -> None:
    """The control: the load above can fail."""
    result = roll(name, {**STOCK, **urls}, has_failed)
    assert result.failures
