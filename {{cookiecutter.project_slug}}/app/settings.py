"""Every setting of the service: read once from the environment and from mounted secret files, then frozen."""

import os
import re
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, SecretStr
from pydantic_core import ValidationError
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError
from pydantic_settings.sources import InitSettingsSource, SecretsSettingsSource


def _matches(pattern: str, takes: str) -> AfterValidator:
    """Return a validator for a whole text; where that holds host and port, the port must be one."""

    def check(value: str | SecretStr) -> str | SecretStr:
        text = value if isinstance(value, str) else value.get_secret_value()
        try:
            valid = re.fullmatch(pattern, text) and urlsplit(text if "://" in text else f"//{text}").port != 0
        except ValueError:  # no port, or a part of a password that holds a slash; its text is not for the log
            valid = False
        if not valid:
            msg = f"takes {takes}"
            raise ValueError(msg)
        return value

    return AfterValidator(check)


def _split(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value


CommaSeparated = (NoDecode, BeforeValidator(_split))
Address = Annotated[str, _matches(r"(\[[\da-fA-F:.]+\]|[^:/\s\[\]]+):\d{1,5}", "host:port, such as 127.0.0.1:8000")]
PostgresUrl = Annotated[SecretStr, _matches(r"postgres(ql)?://\S+", "postgresql://user:password@host:port/database")]
RedisUrl = Annotated[SecretStr, _matches(r"rediss?://\S+", "redis://:password@host:port/0")]
Positive = Annotated[PositiveFloat, Field(allow_inf_nan=False)]
Name = Annotated[str, _matches(r"[A-Za-z0-9][A-Za-z0-9._-]*", "a name without spaces, such as orders-api")]
Lower = BeforeValidator(str.lower)


class Settings(BaseSettings):
    """The settings, named as in the environment but in lower case; README.md says what each of them does.

    `SECRETS_DIR` names a folder with one file per setting. The same setting there and in the environment is refused,
    since one of the two would be ignored silently. An empty value counts as unset.
    """

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, extra="ignore")

    service_name: Name = "service"
    service_version: str = "0.0.0"
    environment: Annotated[Literal["development", "staging", "production"], Lower] = "production"
    secrets_dir: Path | None = None

    database_url: PostgresUrl = SecretStr("postgresql://postgres@127.0.0.1:5432/postgres")
    database_max_connections: PositiveInt = 8
    database_command_timeout_seconds: Positive = 5
    database_acquire_timeout_seconds: Positive = 2
    database_statement_cache_size: NonNegativeInt = 100
    postgres_max_connections: PositiveInt = 200
    redis_url: RedisUrl = SecretStr("redis://127.0.0.1:6379/0")
    readiness_required: Annotated[tuple[Literal["postgres", "redis"], ...], *CommaSeparated] = ("postgres",)
    readiness_timeout_seconds: Positive = 1

    log_level: Annotated[Literal["debug", "info", "warning", "error", "critical"], Lower] = "info"
    log_format: Annotated[Literal["auto", "json", "console"], Lower] = "auto"
    docs_enabled: bool = Field(default_factory=lambda data: data.get("environment") == "development")
    cors_allow_origins: Annotated[tuple[str, ...], *CommaSeparated] = ()
    root_path: Annotated[str, _matches(r"(/\S*[^/\s])?", "a path such as /api, with no slash at its end")] = ""
    forwarded_allow_ips: Annotated[str, Field(pattern=r"^[0-9a-fA-F.:/*, ]+$")] = "127.0.0.1,::1"

    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    bind: Address = Field(default_factory=lambda data: f"0.0.0.0:{p}" if (p := data.get("port")) else "127.0.0.1:8000")
    metrics_bind: Address = "127.0.0.1:9464"
    prometheus_multiproc_dir: Path | None = None

    web_concurrency: PositiveInt | None = None
    workers_per_core: Positive = 1
    max_workers: PositiveInt | None = None
    worker_memory_mb: PositiveInt = 120
    worker_timeout_seconds: NonNegativeInt = 30
    graceful_timeout_seconds: PositiveInt = 50
    termination_grace_seconds: PositiveInt = 60
    keepalive_seconds: PositiveInt = 75
    max_requests: NonNegativeInt = 20_000
    max_requests_jitter: NonNegativeInt = 2_000

    @classmethod
    def settings_customise_sources(  # type: ignore[override]  # noqa: D102
        cls, settings_cls: type[BaseSettings], env_settings: PydanticBaseSettingsSource, **sources: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        if not (folder := os.environ.get("SECRETS_DIR")):
            return sources["init_settings"], env_settings
        if not os.path.isdir(folder):  # noqa: PTH112 - Path.is_dir() raises where a parent may not be entered
            _refuse(f"SECRETS_DIR={folder}: is not a folder; create it or unset SECRETS_DIR")
        try:
            with warnings.catch_warnings(action="error"):
                found = SecretsSettingsSource(settings_cls, secrets_dir=folder)()
            files = {name: value for name, value in found.items() if value}
            # gunicorn.conf.py itself puts the metrics folder into the environment, for prometheus_client
            twice = sorted(files.keys() & env_settings().keys() - {"prometheus_multiproc_dir"})
        except (SettingsError, Warning) as error:
            _refuse(f"SECRETS_DIR={folder}: {error}: {type(error.__cause__).__name__}")
        if twice:
            _refuse(f"{', '.join(twice).upper()}: stands in SECRETS_DIR and in the environment; remove one of them")
        return sources["init_settings"], InitSettingsSource(settings_cls, files), env_settings


def load_settings() -> Settings:
    """Read the settings of this process.

    Raises `SystemExit` with one line that names each wrong setting, its value unless that is a secret, and what it
    takes. Nobody needs a traceback to mend an environment variable.
    """
    try:
        return Settings()
    except ValidationError as error:
        follows = "default_factory_not_called"  # of a default that depends on a wrong setting
        _refuse("; ".join(_fault(fault) for fault in error.errors() if fault["type"] != follows))


def _fault(fault: Any) -> str:
    name = fault["loc"][0]
    secret = isinstance(Settings.model_fields[name].default, SecretStr)
    value = "" if secret else f"={ascii(fault['input']).strip(chr(39))[:80]}"
    return f"{name.upper()}{value}: {fault['msg'].removeprefix('Value error, ').replace('Input should', 'should')}"


def _refuse(message: str) -> NoReturn:
    sys.exit(f"configuration error: {message}")


if __name__ == "__main__":
    load_settings()
