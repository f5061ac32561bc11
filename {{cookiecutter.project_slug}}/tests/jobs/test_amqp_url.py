"""`AMQP_URL`: checked at the start, since aio-pika ignores unknown options and invalid values.

RabbitMQ's documentation, "URI Specification": a virtual host is percent-encoded.
"""

import inspect
import re

import pytest
from aio_pika.connection import Connection
from aiormq import connection as aiormq_connection
from pydantic import SecretStr, ValidationError

from app.network.connection_urls import AMQP_OPTIONS, AMQP_TLS_OPTIONS
from app.settings import Settings

VALID = [
    "",
    "amqp://app:secret@rabbit:5672/orders",
    "amqp://rabbit",
    "amqp://app@rabbit/",
    "amqp://guest:guest@localhost//",
    "amqp://u:p%40%2F%3F@rabbit/%2Forders",
    "amqp://[fd00::1]:5672/",
    "amqps://app:secret@rabbit:5671/?cafile=/does/not/exist&certfile=a&keyfile=b",
    "amqps://rabbit?cadata=QUJD+w==&auth=EXTERNAL&heartbeat=30&no_verify_ssl=0",
    "amqp://rabbit?name=orders&timeout=5&happy_eyeballs_delay=0.25&interleave=1",
]
INVALID = {
    "http://hunter2@rabbit": "must be amqp://user:password@host:port/vhost",
    "hunter2": "must be amqp://",
    "amqp://": "must be amqp://",
    "amqp:///orders": "must be amqp://",
    "amqp://u:hunter2@rabbit:0/": "must be amqp://",
    "amqp://u:hunter2@rabbit:99999/": "must be amqp://",
    "amqp://u:hunter2@rabbit:x/": "must be amqp://",
    "amqp://u:hunter2@h1,h2/": "must be amqp://",
    "amqp://u:hunt/er2@rabbit/": "must be amqp://",
    "amqp://u:1234/hunter2@rabbit/": "must be amqp://",
    "amqp://u:hunt?er2@rabbit/": "must be amqp://",
    "amqp://u:hunt#er2@rabbit/": "must be amqp://",
    "amqp://u:1234?hunter2=1@rabbit/": "unknown option after the question mark",
    "amqp://[::1/": "must be amqp://",
    "amqp://two hosts/": "must be amqp://",
    "amqps://rabbit?ca_certs=/ca.pem": "unknown option ca_certs",
    "amqp://rabbit?reconnect_interval=5": "unknown option reconnect_interval",
    "amqps://rabbit?ssl=1&verify=hunter2": "unknown option ssl, verify",
    "amqp://rabbit?cafile=/ca.pem": "must be amqps:// for cafile",
    "amqp://rabbit?heartbeat=hunter2": "invalid value of heartbeat",
    "amqp://rabbit?heartbeat=70000": "invalid value of heartbeat",
    "amqps://rabbit?no_verify_ssl=hunter2": "invalid value of no_verify_ssl",
    "amqps://rabbit?cafile=": "invalid value of cafile",
    "amqps://rabbit?cadata=hunter2!": "invalid value of cadata",
    "amqp://rabbit?auth=hunter2": "invalid value of auth",
}


@pytest.mark.parametrize("url", VALID)
def test_url_of_the_client_is_accepted(url: str) -> None:
    assert Settings(amqp_url=SecretStr(url)).amqp_url.get_secret_value() == url


@pytest.mark.parametrize(("url", "problem"), INVALID.items())
def test_invalid_url_is_rejected_without_its_secret(url: str, problem: str) -> None:
    with pytest.raises(ValidationError) as raised:
        Settings(amqp_url=SecretStr(url))
    errors = raised.value.errors()
    (error,) = [each for each in errors if each["type"] != "default_factory_not_called"]
    assert error["loc"] == ("amqp_url",)
    assert problem in error["msg"]
    assert "hunter2" not in error["msg"]
    assert "er2" not in error["msg"]


def test_options_are_those_of_the_client() -> None:
    source = inspect.getsource(aiormq_connection)
    read_by_aiormq = set(re.findall(r'url\.query\.get\("(\w+)"', source))
    read_by_aio_pika = {parameter.name for parameter in Connection.PARAMETERS}
    assert AMQP_OPTIONS.keys() | AMQP_TLS_OPTIONS.keys() == read_by_aiormq | read_by_aio_pika
