"""Every setting of the service: read once from the environment and from mounted secret files, then frozen."""

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import Field, NonNegativeInt, PositiveInt, SecretStr
from pydantic_core import ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)
from pydantic_settings.sources import InitSettingsSource, SecretsSettingsSource

from app import setting_types  # example
from app.setting_types import (
    CommaSeparated,
    HostPort,
    LowerCase,
    NonNegativeSeconds,
    PathPrefix,
    PositiveSeconds,
    PostgresUrl,
    RedisUrl,
    ServiceName,
)


class Settings(BaseSettings):
    """The settings, named as in the environment but in lower case; README.md says what each of them does.

    `SECRETS_DIR` names a folder with one file per setting. The same setting there and in the environment is refused,
    since one of the two would be ignored silently. An empty value counts as unset.
    """

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, extra="ignore")

    service_name: ServiceName = "service"
    service_version: str = "0.0.0"
    environment: Annotated[Literal["development", "staging", "production"], LowerCase] = (
        "production"
    )
    secrets_dir: Path | None = None

    database_url: PostgresUrl = SecretStr("postgresql://postgres@127.0.0.1:5432/postgres")
    database_max_connections: PositiveInt = 8
    database_command_timeout_seconds: PositiveSeconds = 5
    database_acquire_timeout_seconds: PositiveSeconds = 1
    database_retry_seconds: NonNegativeSeconds = 3
    database_statement_cache_size: NonNegativeInt = 100
    postgres_max_connections: PositiveInt = 200
    redis_url: RedisUrl = SecretStr("redis://127.0.0.1:6379/0")
    readiness_required: Annotated[tuple[Literal["postgres", "redis"], ...], *CommaSeparated] = (
        "postgres",
    )
    readiness_timeout_seconds: PositiveSeconds = 1

    log_level: Annotated[Literal["debug", "info", "warning", "error", "critical"], LowerCase] = (
        "info"
    )
    log_format: Annotated[Literal["auto", "json", "console"], LowerCase] = "auto"
    access_log_flush_ms: NonNegativeInt = 100
    docs_enabled: bool = Field(
        default_factory=lambda data: data.get("environment") == "development"
    )
    cors_allow_origins: Annotated[tuple[str, ...], *CommaSeparated] = ()
    root_path: PathPrefix = ""
    forwarded_allow_ips: Annotated[str, Field(pattern=r"^[0-9a-fA-F.:/*, ]+$")] = "127.0.0.1,::1"

    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    bind: HostPort = Field(
        default_factory=lambda data: f"0.0.0.0:{p}" if (p := data.get("port")) else "127.0.0.1:8000"
    )
    metrics_bind: HostPort = "127.0.0.1:9464"
    prometheus_multiproc_dir: Path | None = None

    max_header_bytes: PositiveInt = 32_768
    max_body_bytes: PositiveInt = 1_048_576
    max_in_flight: PositiveInt = 256
    header_timeout_seconds: PositiveSeconds = 10
    request_body_timeout_seconds: PositiveSeconds = 15
    request_timeout_seconds: PositiveSeconds = 30
    keepalive_seconds: PositiveInt = 75
    gateway_url: setting_types.HttpUrl = "http://127.0.0.1:8090"  # example
    message_concurrency_per_worker: PositiveInt = 8  # example
    rate_limit_per_minute: PositiveInt = 60_000  # example

    web_concurrency: PositiveInt | None = None
    workers_per_core: PositiveSeconds = 1
    max_workers: PositiveInt | None = None
    worker_memory_mb: PositiveInt = 120
    worker_timeout_seconds: NonNegativeInt = 30
    graceful_timeout_seconds: PositiveInt = 50
    termination_grace_seconds: PositiveInt = 60
    drain_seconds: NonNegativeSeconds = 10
    retire_seconds: NonNegativeSeconds = 5
    max_requests: NonNegativeInt = 20_000
    max_requests_jitter: NonNegativeInt = 2_000

    @classmethod
    def settings_customise_sources(  # type: ignore[override]  # noqa: D102
        cls,
        settings_cls: type[BaseSettings],
        env_settings: PydanticBaseSettingsSource,
        **sources: Any,
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
            _refuse(
                f"{', '.join(twice).upper()}: stands in SECRETS_DIR and in the environment; remove one of them"
            )
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
    shown = ascii(fault["input"]).strip("'").rpartition("@")[2]  # before it a URL has its password
    value = "" if secret else f"={shown[:80]}"
    return f"{name.upper()}{value}: {fault['msg'].removeprefix('Value error, ').replace('Input should', 'should')}"


def _refuse(message: str) -> NoReturn:
    sys.exit(f"configuration error: {message}")


if __name__ == "__main__":
    load_settings()
