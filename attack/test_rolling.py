"""Two instances behind a real proxy are restarted one after the other, while everybody goes on asking."""

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
REQUESTS = 50_000  # at least, behind each proxy
STOCK = {
    "GUNICORN_CMD_ARGS": f"--config {shlex.quote(str(Path(__file__).with_name('stock_gunicorn.conf.py')))}"
}


def lasting_port() -> int:
    """Return a free port that stays free while its server restarts: none that outgoing connections are given."""
    while True:
        port = random.randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


class Instance:
    """One instance of the service, which keeps its port when it restarts."""

    def __init__(self, settings: dict[str, str]) -> None:
        self.port, self.settings, self.stack = lasting_port(), settings, contextlib.ExitStack()

    def __enter__(self) -> "Instance":
        self.service = self.stack.enter_context(
            serving("tests.fault_routes:app", self.port, **self.settings)
        )
        self.service.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def restart(self) -> None:
        """End as a platform ends it, start again, and wait until the proxy knows, and has sent something."""
        assert self.service.stop() == 0, self.service.text
        self.stack.close()
        self.__enter__()
        eventually(lambda: "/payments" in self.service.text)


def roll(name: str, settings: dict[str, str], is_enough: Callable[[int, Result], object]) -> Result:
    """Return what became of mixed load behind a proxy while its two instances restarted in turn, until it is enough."""
    port, restarts = lasting_port(), 0
    one, other = Instance(settings), Instance(settings)
    with one, other, proxy(name, port, (one.port, other.port)), load(port, MIXED) as result:
        while not is_enough(restarts, result):
            (one, other)[restarts % 2].restart()
            restarts += 1
    print(f"{restarts} restarts behind {name}: {result}")
    return result


@pytest.mark.parametrize("name", ["nginx", "haproxy"])
def test_rolling_restarts_lose_no_request(name: str, urls: dict[str, str]) -> None:
    settings = {"DRAIN_SECONDS": "3", "RETIRE_SECONDS": "2", **urls}
    result = roll(
        name, settings, lambda restarts, result: restarts >= RESTARTS and result.total >= REQUESTS
    )
    assert result.failures == [], str(result)


@pytest.mark.parametrize("name", ["nginx", "haproxy"])
def test_with_the_usual_worker_the_same_restarts_lose_some(name: str, urls: dict[str, str]) -> None:
    result = roll(
        name, {**STOCK, **urls}, lambda restarts, result: restarts >= 30 or result.failures
    )
    assert result.failures
