"""Validated types for settings. Each error describes a valid value."""

import re
import socket
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    NonNegativeFloat,
    PositiveFloat,
    SecretStr,
)
from pydantic_core import CoreSchema, core_schema
from pydantic_settings import NoDecode

from app.connection_urls import check_postgres_url, check_redis_url


def _check(text: str, pattern: str, requirement: str) -> None:
    """Raise `ValueError` unless the whole text matches and its port, if any, is 1 to 65535."""
    try:
        port = urlsplit(text if "://" in text else f"//{text}").port
        is_valid = re.fullmatch(pattern, text) is not None and port != 0
    except ValueError:  # an invalid port; or a slash in the password, which must not be logged
        is_valid = False
    if not is_valid:
        msg = f"must be {requirement}"
        raise ValueError(msg)


def _matches(pattern: str, requirement: str) -> AfterValidator:
    """Return a validator that accepts a text, secret or not, only if all of it matches."""

    def check(value: str | SecretStr) -> str | SecretStr:
        text = value if isinstance(value, str) else value.get_secret_value()
        _check(text, pattern, requirement)
        return value

    return AfterValidator(check)


def _accepted_by(check: Callable[[str], None]) -> AfterValidator:
    """Return a validator of a secret: `check` raises `ValueError`, without the secret."""

    def validate(value: SecretStr) -> SecretStr:
        check(value.get_secret_value())
        return value

    return AfterValidator(validate)


class HostPort(str):
    """An address to listen on: `host:port`, with an IPv6 host in brackets."""

    __slots__ = ()

    @classmethod
    def __get_pydantic_core_schema__(cls, _: Any, __: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(cls._parse, core_schema.str_schema())

    @classmethod
    def _parse(cls, text: str) -> Self:
        pattern = r"(\[[\da-fA-F:.]+\]|[^:/\s\[\]]+):\d{1,5}"
        _check(text, pattern, "host:port, for example 127.0.0.1:8000")
        return cls(text)

    @property
    def host(self) -> str:
        """The host, without the brackets of an IPv6 address."""
        return self.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port number."""
        return int(self.rpartition(":")[2])

    @property
    def family(self) -> socket.AddressFamily:
        """The address family of a socket that listens there."""
        return socket.AF_INET6 if "[" in self else socket.AF_INET


def _split(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value


CommaSeparated = (NoDecode, BeforeValidator(_split))
LowerCase = BeforeValidator(str.lower)
LogLevel = Annotated[Literal["debug", "info", "warning", "error", "critical"], LowerCase]

Positive = Annotated[PositiveFloat, Field(allow_inf_nan=False)]
NonNegative = Annotated[NonNegativeFloat, Field(allow_inf_nan=False)]

# example: begin
_OCTET = r"(25[0-5]|2[0-4]\d|1?\d?\d)"
_IPV4 = _OCTET + r"(\." + _OCTET + r"){3}"
_IPV6 = r"\[[\da-fA-F:.]+\]"
_NAME = r"(?![\d.]+([:/]|$))\w[\w-]*(\.\w[\w-]*)*"
_HOST = f"({_IPV4}|{_IPV6}|{_NAME})"
_HTTP_URL = r"https?://([^\s/@?#]*@)?" + _HOST + r"(:\d{1,5})?(/[^\s?#]*)?"
HttpUrl = Annotated[str, _matches(_HTTP_URL, "https://gateway.example, without ? and #")]
# example: end

ServiceName = Annotated[
    str, _matches(r"[A-Za-z0-9][A-Za-z0-9._-]*", "a name without spaces, for example orders-api")
]
PathPrefix = Annotated[
    str, _matches(r"(/\S*[^/\s])?", "a path without a slash at its end, for example /api")
]
PostgresUrl = Annotated[SecretStr, _accepted_by(check_postgres_url)]
RedisUrl = Annotated[SecretStr, _accepted_by(check_redis_url)]
