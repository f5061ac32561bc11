"""Validated types of settings."""

import socket

import pytest
from pydantic import TypeAdapter, ValidationError

from app.setting_types import HostPort

ADDRESS = TypeAdapter(HostPort)


@pytest.mark.parametrize(
    ("text", "host", "port", "family"),
    [
        ("127.0.0.1:8000", "127.0.0.1", 8000, socket.AF_INET),
        ("0.0.0.0:1", "0.0.0.0", 1, socket.AF_INET),
        ("localhost:65535", "localhost", 65535, socket.AF_INET),
        ("[::1]:8000", "::1", 8000, socket.AF_INET6),
        ("[::]:9464", "::", 9464, socket.AF_INET6),
        ("[fe80::1:2]:80", "fe80::1:2", 80, socket.AF_INET6),
    ],
)
def test_host_port_has_its_parts(
    text: str, host: str, port: int, family: socket.AddressFamily
) -> None:
    address = ADDRESS.validate_python(text)
    assert address.host == host
    assert address.port == port
    assert address.family == family
    assert address == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8000",
        ":8000",
        "localhost",
        "localhost:",
        "localhost:0",
        "localhost:65536",
        "localhost:http",
        "::1:8000",
        "[::1]",
        "[localhost]:8000",
        "http://localhost:8000",
        "localhost:8000/path",
        "two hosts:8000",
    ],
)
def test_invalid_host_port_is_rejected(text: str) -> None:
    with pytest.raises(ValidationError, match="must be host:port, for example"):
        ADDRESS.validate_python(text)
