"""Validated types for settings. Each error describes a valid value."""

import ipaddress
import math
import re
import socket
import zoneinfo  # jobs
from collections.abc import Callable
from itertools import pairwise
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

from app.network import connection_urls


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


def _check_proxies(text: str) -> str:
    """Return the addresses, comma-separated. Raises `ValueError` for one that never matches."""
    proxies = _split(text)
    if proxies == ("*",):
        return "*"
    if not proxies or "*" in proxies:
        msg = "must be addresses and networks, for example 10.0.0.0/8,::1, or * alone"
        raise ValueError(msg)
    return ",".join(_check_proxy(each) for each in proxies)


def _check_proxy(text: str) -> str:
    """Return an address or a network, one of IPv4-mapped IPv6 (RFC 4291, 2.5.5.2) as IPv4."""
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        network = None
    if network is None or "%" in text:
        msg = f"{text!r} must be an IP address, or a network whose host bits are 0"
        raise ValueError(msg)
    first = network.network_address
    is_address = network.prefixlen == network.max_prefixlen
    if first.is_multicast or (is_address and first.is_unspecified):
        msg = f"{text!r} is never the address of a proxy"
        raise ValueError(msg)
    mapped = first.ipv4_mapped if isinstance(first, ipaddress.IPv6Address) else None
    if mapped is None or network.prefixlen < _MAPPED_PREFIX:
        return text
    return str(mapped) if is_address else f"{mapped}/{network.prefixlen - _MAPPED_PREFIX}"


#: The bits before the IPv4 address in `::ffff:0:0/96`.
_MAPPED_PREFIX = 96

ForwardedAllowIps = Annotated[str, AfterValidator(_check_proxies)]


def _check_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    """Raise `ValueError` for an origin that no browser sends."""
    if "*" in origins and len(origins) > 1:
        msg = "must be origins, or * alone"
        raise ValueError(msg)
    for origin in origins:
        if origin not in {"*", "null"} and origin != _serialize_origin(origin):
            msg = (
                f"{origin!r} must be an origin as browsers send it: https://a.example or "
                "https://a.example:8443, in lower case, without path, default port and wildcard"
            )
            raise ValueError(msg)
    return origins


def _serialize_origin(text: str) -> str | None:
    """Return an origin as browsers serialize it (RFC 6454, section 6.2), or None."""
    match = re.fullmatch(r"([a-z][a-z\d+.-]*)://(\[[\da-f:]+\]|[a-z\d_.-]+)(?::(\d+))?", text)
    if match is None:
        return None
    scheme, host, port = match.groups()
    number = int(port) if port else 0
    if port and (number == _DEFAULT_PORTS.get(scheme) or not 1 <= number <= MAX_PORT):
        return None
    try:
        if host.startswith("["):
            host = f"[{ipaddress.IPv6Address(host[1:-1])}]"
        elif re.fullmatch(r"[\d.]+", host):
            host = str(ipaddress.IPv4Address(host))
    except ValueError:
        return None
    return f"{scheme}://{host}:{number}" if port else f"{scheme}://{host}"


_DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443, "ftp": 21}
MAX_PORT = 65_535

Origins = Annotated[tuple[str, ...], *CommaSeparated, AfterValidator(_check_origins)]
LowerCase = BeforeValidator(str.lower)
LogLevel = Annotated[Literal["debug", "info", "warning", "error", "critical"], LowerCase]

Positive = Annotated[PositiveFloat, Field(allow_inf_nan=False)]
NonNegative = Annotated[NonNegativeFloat, Field(allow_inf_nan=False)]

_OCTET = r"(25[0-5]|2[0-4]\d|1?\d?\d)"
_IPV4 = _OCTET + r"(\." + _OCTET + r"){3}"
_IPV6 = r"\[[\da-fA-F:.]+\]"
_NAME = r"(?![\d.]+([:/]|$))\w[\w-]*(\.\w[\w-]*)*"
_HOST = f"({_IPV4}|{_IPV6}|{_NAME})"
_HTTP_URL = r"https?://([^\s/@?#]*@)?" + _HOST + r"(:\d{1,5})?(/[^\s?#]*)?"
#: Hosts that only this machine can reach: RFC 6761, section 6.3; RFC 1122, section 3.2.1.3.
_LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|::1")


def check_provider_url(url: str, environment: str, *, is_of_keys: bool = False) -> None:
    """Raise `ValueError` for a URL over which others could replace the keys of the issuer.

    That of the keys may have a query, as Azure AD B2C has it; that of the issuer has none (OpenID
    Connect Discovery 1.0, section 3).
    """
    if is_of_keys:
        _check(url, _HTTP_URL + r"(\?[^\s#]*)?", "https://login.example/keys, without #")
    else:
        _check(url, _HTTP_URL, "https://login.example, without ? and #")
    parts = urlsplit(url)
    if "@" in parts.netloc:
        msg = "must have no login"
        raise ValueError(msg)
    is_local = _LOOPBACK.fullmatch(parts.hostname or "") is not None
    if parts.scheme != "https" and environment != "development" and not is_local:
        msg = "must be https:// outside development"
        raise ValueError(msg)


Audience = Annotated[str, _matches(r"\S{1,200}", "the identifier of this service, without spaces")]
TokenAlgorithms = Annotated[
    tuple[
        Literal[
            "RS256",
            "RS384",
            "RS512",
            "PS256",
            "PS384",
            "PS512",
            "ES256",
            "ES384",
            "ES512",
            "EdDSA",
            "Ed25519",
        ],
        ...,
    ],
    *CommaSeparated,
    Field(min_length=1),
]
# example: begin
HttpUrl = Annotated[str, _matches(_HTTP_URL, "https://gateway.example, without ? and #")]
TokenUrl = Annotated[
    str,
    _matches(
        r"(?![^/]*//[^/]*@)" + _HTTP_URL, "https://login.example/token, without login, ? and #"
    ),
]
# example: end


# jobs: begin
def _check_timezone(name: str) -> str:
    try:
        zoneinfo.ZoneInfo(name)
    except (ValueError, LookupError, OSError):  # OSError: the name of a directory
        msg = "must be a time zone, for example Europe/Berlin"
        raise ValueError(msg) from None
    return name


AmqpUrl = Annotated[SecretStr, _accepted_by(connection_urls.check_amqp_url)]
TimeZone = Annotated[str, AfterValidator(_check_timezone)]

# jobs: end
#: The endpoint of a collector. Credentials are in its headers, which are a secret.
OtlpUrl = Annotated[
    str, _matches(r"(?![^/]*//[^/]*@)" + _HTTP_URL, "http://collector:4318, without login, ? and #")
]
#: Pairs whose values are percent-encoded: OpenTelemetry, "OTLP Exporter Configuration".
_OTLP_HEADER = r"[ \t]*[\w!#$%&'*+.^`|~-]+[ \t]*=[ !#-+\--:<-\[\]-~]*"
OtlpHeaders = Annotated[
    SecretStr,
    _matches(
        rf"({_OTLP_HEADER}(,{_OTLP_HEADER})*)?", "name=value,name=value, values percent-encoded"
    ),
]
#: OpenTelemetry, "General SDK Configuration": the samplers without a service of their own.
TraceSampler = Annotated[
    Literal[
        "always_on",
        "always_off",
        "traceidratio",
        "parentbased_always_on",
        "parentbased_always_off",
        "parentbased_traceidratio",
    ],
    LowerCase,
]

ServiceName = Annotated[
    str, _matches(r"[A-Za-z0-9][A-Za-z0-9._-]*", "a name without spaces, for example orders-api")
]
#: The fields of log lines that the service sets itself; README.md, "Logs", describes them.
OWN_LOG_FIELDS = frozenset(
    re.findall(
        r"\w+",
        """
        timestamp level logger message service pid exception stack
        request_id trace_id span_id trace_flags parent_span_id principal
        method path route status duration_ms request_bytes response_bytes client close_code
        dependency reason task stacks requests arguments format_error
        error function process_pid exit
        """,
    )
)
OWN_LOG_FIELDS |= {"job_id", "job_type", "attempts"}  # jobs
#: Every log line repeats the fields.
MAX_LOG_FIELDS_CHARACTERS = 500


def _parse_log_fields(value: str | tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Return the pairs of `name=value,name=value`. Raises `ValueError`."""
    if not isinstance(value, str):
        return value
    if len(value) > MAX_LOG_FIELDS_CHARACTERS:
        msg = f"must be at most {MAX_LOG_FIELDS_CHARACTERS} characters: every line repeats them"
        raise ValueError(msg)
    pairs = [_parse_log_field(text.strip()) for text in value.split(",") if text.strip()]
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            msg = f"{name} must not be set twice"
            raise ValueError(msg)
    return tuple(pairs)


def _parse_log_field(text: str) -> tuple[str, str]:
    """Return the name and the value of one field. Raises `ValueError`."""
    match = re.fullmatch(r"([a-z][a-z0-9_]*)=(.+)", text)
    if match is None or not text.isprintable():
        msg = "must be name=value, comma-separated, for example team=checkout,region=eu"
        raise ValueError(msg)
    name, value = match.groups()
    if name in OWN_LOG_FIELDS:
        msg = f"{name} is a field of the service itself; choose another name"
        raise ValueError(msg)
    return name, value


LogFields = Annotated[tuple[tuple[str, str], ...], NoDecode, BeforeValidator(_parse_log_fields)]
MetricsPrefix = Annotated[
    str,
    _matches(
        r"([A-Za-z_]\w*_)?",
        "letters, digits and underscores, the last an underscore, for example orders_",
    ),
]


def _parse_buckets(value: str | tuple[float, ...]) -> tuple[float, ...]:
    """Return upper bounds of buckets. Raises `ValueError` for those that a histogram cannot use."""
    texts = value.replace(",", " ").split() if isinstance(value, str) else value
    try:
        bounds = tuple(float(text) for text in texts)
    except ValueError:
        bounds = ()
    is_ascending = all(low < high for low, high in pairwise((0, *bounds, math.inf)))
    if not bounds or not is_ascending:
        msg = "must be seconds above 0, comma-separated and ascending, for example 0.1,0.5,1"
        raise ValueError(msg)
    return bounds


MetricsBuckets = Annotated[tuple[float, ...], NoDecode, BeforeValidator(_parse_buckets)]
PathPrefix = Annotated[
    str, _matches(r"(/\S*[^/\s])?", "a path without a slash at its end, for example /api")
]
PostgresUrl = Annotated[SecretStr, _accepted_by(connection_urls.check_postgres_url)]
ReplicaUrl = Annotated[SecretStr, _accepted_by(connection_urls.check_replica_url)]
RedisUrl = Annotated[SecretStr, _accepted_by(connection_urls.check_redis_url)]
