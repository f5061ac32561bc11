"""What a setting may look like: each type refuses the rest, and says what it takes."""

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    SecretStr,
)
from pydantic_settings import NoDecode


def _matches(pattern: str, takes: str) -> AfterValidator:
    """Return a validator for a whole text; where that holds host and port, the port must be one."""

    def check(value: str | SecretStr) -> str | SecretStr:
        text = value if isinstance(value, str) else value.get_secret_value()
        try:
            valid = (
                re.fullmatch(pattern, text)
                and urlsplit(text if "://" in text else f"//{text}").port != 0
            )
        except (
            ValueError
        ):  # no port, or a part of a password that holds a slash; its text is not for the log
            valid = False
        if not valid:
            raise ValueError(f"takes {takes}")
        return value

    return AfterValidator(check)


def _split(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value


CommaSeparated = (NoDecode, BeforeValidator(_split))
HostPort = Annotated[
    str, _matches(r"(\[[\da-fA-F:.]+\]|[^:/\s\[\]]+):\d{1,5}", "host:port, such as 127.0.0.1:8000")
]
PostgresUrl = Annotated[
    SecretStr, _matches(r"postgres(ql)?://\S+", "postgresql://user:password@host:port/database")
]
RedisUrl = Annotated[SecretStr, _matches(r"rediss?://\S+", "redis://:password@host:port/0")]
_OCTET = r"(25[0-5]|2[0-4]\d|1?\d?\d)"  # example
_IPV4, _IPV6 = _OCTET + r"(\." + _OCTET + r"){3}", r"\[[\da-fA-F:.]+\]"  # example
_HOST = f"({_IPV4}|{_IPV6}" + r"|(?![\d.]+([:/]|$))\w[\w-]*(\.\w[\w-]*)*)"  # example
_HTTP_URL = r"https?://([^\s/@?#]*@)?" + _HOST + r"(:\d{1,5})?(/[^\s?#]*)?"  # example
HttpUrl = Annotated[str, _matches(_HTTP_URL, "https://gateway.example, without ? and #")]  # example
PositiveSeconds = Annotated[PositiveFloat, Field(allow_inf_nan=False)]
NonNegativeSeconds = Annotated[NonNegativeFloat, Field(allow_inf_nan=False)]
ServiceName = Annotated[
    str, _matches(r"[A-Za-z0-9][A-Za-z0-9._-]*", "a name without spaces, such as orders-api")
]
LowerCase = BeforeValidator(str.lower)
PathPrefix = Annotated[
    str, _matches(r"(/\S*[^/\s])?", "a path such as /api, with no slash at its end")
]
