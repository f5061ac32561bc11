"""Every setting: read once from the environment and from secret files, then frozen."""

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import Field, FilePath, NonNegativeInt, PositiveInt, SecretStr, model_validator
from pydantic_core import ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)
from pydantic_settings.sources import InitSettingsSource, SecretsSettingsSource

from app.setting_types import (
    AmqpUrl,  # jobs
    Audience,
    CommaSeparated,
    ForwardedAllowIps,
    HostPort,
    HttpUrl,  # example
    LogFields,
    LogLevel,
    LowerCase,
    MetricsBuckets,
    MetricsPrefix,
    NonNegative,
    Origins,
    OtlpHeaders,
    OtlpUrl,
    PathPrefix,
    Positive,
    PostgresUrl,
    RedisUrl,
    ReplicaUrl,
    ServiceName,
    TimeZone,  # jobs
    TokenAlgorithms,
    TokenUrl,  # example
    TraceSampler,
    check_provider_url,
)

#: What the start and `make doctor` say while `Settings.is_open`.
OPEN = (
    "AUTH_ISSUER is not set, so no caller is authenticated: set it, or AUTH_DISABLED=true if a "
    "proxy authenticates them"
)
#: Characters of an invalid value that are shown.
SHOWN_CHARACTERS = 80


def _default_docs_enabled(data: dict[str, Any]) -> bool:
    return data.get("environment") == "development"


def _default_key_prefix(data: dict[str, Any]) -> str:
    return str(data.get("service_name"))


def _default_max_buffered_bytes(data: dict[str, Any]) -> int:
    return max(12 << 20, int(data.get("max_body_bytes", 0)))


def _default_bind(data: dict[str, Any]) -> HostPort:
    port = data.get("port")
    return HostPort(f"0.0.0.0:{port}" if port else "127.0.0.1:8000")


class Settings(BaseSettings):
    """The settings, named as in the environment but in lower case. README.md describes each.

    `SECRETS_DIR` names a directory with one file per setting. A setting that is both there and in
    the environment is rejected, since one of the two would be ignored silently. An empty value
    counts as unset.
    """

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, extra="ignore")

    # The service
    service_name: ServiceName = "service"
    service_version: str = "0.0.0"
    environment: Annotated[Literal["development", "staging", "production"], LowerCase] = (
        "production"
    )
    secrets_dir: Path | None = None

    # Postgres and Redis
    database_url: PostgresUrl = SecretStr("postgresql://postgres@127.0.0.1:5432/postgres")
    database_max_connections: PositiveInt | None = None
    database_command_timeout_seconds: Positive = 5
    database_acquire_timeout_seconds: Positive = 1
    database_retry_seconds: NonNegative = 3
    database_statement_cache_size: NonNegativeInt = 100
    postgres_max_connections: PositiveInt = 200
    redis_url: RedisUrl = SecretStr("redis://127.0.0.1:6379/0")
    readiness_required: Annotated[tuple[Literal["postgres", "redis"], ...], *CommaSeparated] = (
        "postgres",
    )
    readiness_timeout_seconds: Positive = 1
    redis_key_prefix: ServiceName = Field(default_factory=_default_key_prefix)

    # Logs, documentation, and the proxy in front
    log_level: LogLevel = "info"
    log_format: Annotated[Literal["auto", "json", "gcp", "console"], LowerCase] = "auto"
    access_log_flush_ms: NonNegativeInt = 100
    log_fields: LogFields = ()
    log_sql: bool = False
    docs_enabled: bool = Field(default_factory=_default_docs_enabled)
    cors_allow_origins: Origins = ()
    root_path: PathPrefix = ""
    forwarded_allow_ips: ForwardedAllowIps = "127.0.0.1,::1"

    # A read replica of Postgres, off without a URL
    database_replica_url: ReplicaUrl = SecretStr("")
    database_replica_max_connections: PositiveInt | None = None
    database_replica_max_lag_seconds: Positive = 5

    # Authentication, off without an issuer
    auth_issuer: str | None = None
    auth_audience: Audience | None = None
    auth_jwks_url: str | None = None
    auth_algorithms: TokenAlgorithms = ("RS256", "ES256", "EdDSA")
    auth_leeway_seconds: Annotated[NonNegative, Field(le=300)] = 30
    auth_scopes_claim: str = "scope"
    auth_disabled: bool = False
    log_principal: Literal["hashed", "plain", "none"] = "hashed"

    # Traces: OpenTelemetry's own variables, off without an endpoint
    otel_exporter_otlp_endpoint: OtlpUrl | None = None
    otel_exporter_otlp_traces_endpoint: OtlpUrl | None = None
    otel_exporter_otlp_headers: OtlpHeaders = SecretStr("")
    otel_exporter_otlp_timeout: Positive = 3
    otel_exporter_otlp_compression: Literal["none", "gzip", "deflate"] = "none"
    otel_exporter_otlp_certificate: FilePath | None = None
    otel_exporter_otlp_client_certificate: FilePath | None = None
    otel_exporter_otlp_client_key: FilePath | None = None
    otel_exporter_otlp_protocol: Literal["http/protobuf"] = "http/protobuf"
    otel_traces_exporter: Literal["otlp", "none"] = "otlp"
    otel_traces_sampler: TraceSampler = "parentbased_always_on"
    otel_traces_sampler_arg: Annotated[float, Field(ge=0, le=1)] = 1
    otel_bsp_schedule_delay: PositiveInt = 5_000
    otel_bsp_max_queue_size: PositiveInt = 2_048
    otel_bsp_max_export_batch_size: PositiveInt = 512
    otel_sdk_disabled: bool = False

    # Addresses to listen on
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    bind: HostPort = Field(default_factory=_default_bind)
    metrics_bind: HostPort = HostPort("127.0.0.1:9464")
    prometheus_multiproc_dir: Path | None = None
    metrics_prefix: MetricsPrefix = ""
    metrics_buckets: MetricsBuckets = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
    metrics_max_label_sets: PositiveInt = 1_000

    # Limits of requests
    max_header_bytes: PositiveInt = 32_768
    max_body_bytes: PositiveInt = 1_048_576
    max_in_flight: PositiveInt = 256
    header_timeout_seconds: Positive = 10
    request_body_timeout_seconds: Positive = 15
    request_timeout_seconds: Positive = 30
    keepalive_seconds: PositiveInt = 75
    max_streams: PositiveInt = 512
    max_buffered_bytes: PositiveInt = Field(default_factory=_default_max_buffered_bytes)

    # example: begin
    # Payments
    gateway_url: HttpUrl = "http://127.0.0.1:8090"
    message_concurrency_per_worker: PositiveInt = 8
    rate_limit_per_minute: PositiveInt = 60_000
    gateway_ca_file: Path | None = None
    gateway_token_url: TokenUrl | None = None
    gateway_client_id: str = ""
    gateway_client_secret: SecretStr = SecretStr("")
    gateway_token_scopes: str = ""
    gateway_token_audience: str = ""

    # example: end
    # jobs: begin
    # Jobs
    amqp_url: AmqpUrl = SecretStr("")
    job_concurrency: PositiveInt = 8
    job_processes: PositiveInt | None = None
    job_calls_per_process: PositiveInt = 1000
    job_timezone: TimeZone = "UTC"
    #: Whether computations wait while other processes of the control group or session want the CPU.
    job_yields_cpu: bool = True

    # jobs: end
    # Workers and shutdown
    web_concurrency: PositiveInt | None = None
    workers_per_core: Positive = 1
    max_workers: PositiveInt | None = None
    worker_memory_mb: PositiveInt = 120
    worker_timeout_seconds: NonNegativeInt = 30
    graceful_timeout_seconds: PositiveInt = 50
    termination_grace_seconds: PositiveInt = 60
    drain_seconds: NonNegative = 10
    retire_seconds: NonNegative = 5
    max_requests: NonNegativeInt = 20_000
    max_requests_jitter: NonNegativeInt = 2_000

    @model_validator(mode="after")
    def _check_authentication(self) -> Self:
        """Raise `ValueError` for settings of authentication that contradict each other."""
        is_on = self.auth_issuer is not None
        rules = [
            (not is_on and self.auth_audience, "AUTH_ISSUER: must be set, since AUTH_AUDIENCE is"),
            (not is_on and self.auth_jwks_url, "AUTH_ISSUER: must be set, since AUTH_JWKS_URL is"),
            (is_on and self.auth_disabled, "AUTH_DISABLED=true: must be unset with AUTH_ISSUER"),
            (is_on and not self.auth_audience, "AUTH_AUDIENCE: must be set, since AUTH_ISSUER is"),
        ]
        problems = [text for is_broken, text in rules if is_broken]
        problems += self._problems_of_provider_urls()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems_of_provider_urls(self) -> Iterator[str]:
        for name in ("auth_issuer", "auth_jwks_url"):
            url = getattr(self, name)
            try:
                if url is not None:
                    is_of_keys = name == "auth_jwks_url"
                    check_provider_url(url, self.environment, is_of_keys=is_of_keys)
            except ValueError as error:
                yield _describe(name.upper(), url, str(error))

    @property
    def is_open(self) -> bool:
        """Whether nobody is authenticated outside development, and no setting confirms it."""
        is_decided = self.auth_issuer is not None or self.auth_disabled
        return self.environment != "development" and not is_decided

    @property
    def has_replica(self) -> bool:
        """Whether there is a read replica of Postgres."""
        return bool(self.database_replica_url.get_secret_value())

    @property
    def has_traces(self) -> bool:
        """Whether there is an endpoint to send spans to, and traces are not disabled."""
        endpoint = self.otel_exporter_otlp_traces_endpoint or self.otel_exporter_otlp_endpoint
        is_off = self.otel_sdk_disabled or self.otel_traces_exporter == "none"
        return bool(endpoint) and not is_off

    @classmethod
    def settings_customise_sources(  # type: ignore[override]  # noqa: D102
        cls,
        settings_cls: type[BaseSettings],
        env_settings: PydanticBaseSettingsSource,
        **sources: Any,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        init_settings = sources["init_settings"]
        directory = os.environ.get("SECRETS_DIR")
        if not directory:
            return init_settings, env_settings
        try:
            files = _read_secret_files(settings_cls, directory)
            environment = env_settings()
        except (SettingsError, Warning) as error:
            fail("SECRETS_DIR", directory, f"{error}: {type(error.__cause__).__name__}")
        # gunicorn.conf.py itself puts the metrics directory into the environment
        duplicates = files.keys() & environment.keys() - {"prometheus_multiproc_dir"}
        if duplicates:
            names = ", ".join(sorted(duplicates)).upper()
            fail(names, None, "is set in both SECRETS_DIR and the environment; remove one")
        return init_settings, InitSettingsSource(settings_cls, files), env_settings


def load_settings() -> Settings:
    """Read the settings of this process.

    Raises `SystemExit` with one line that lists each invalid setting, its value unless that is a
    secret, and what it must be. A traceback would not help to fix an environment variable.
    """
    try:
        return Settings()
    except ValidationError as error:
        # A default that depends on an invalid setting is not an error of its own.
        errors = [each for each in error.errors() if each["type"] != "default_factory_not_called"]
        _exit([_describe_error(each) for each in errors])


def fail(name: str, value: object, problem: str) -> NoReturn:
    """Exit with one line: the setting, its value, and what is wrong with it.

    A value of None is not shown. Of a URL only the part after its credentials is.
    """
    _exit([_describe(name, value, problem)])


def _read_secret_files(settings_cls: type[BaseSettings], directory: str) -> dict[str, Any]:
    """Return the settings that are not empty. Raises `SettingsError` or `Warning`."""
    if not os.path.isdir(directory):  # noqa: PTH112 - Path.is_dir() raises without permission
        fail("SECRETS_DIR", directory, "is not a directory; create it or unset SECRETS_DIR")
    with warnings.catch_warnings(action="error"):
        found = SecretsSettingsSource(settings_cls, secrets_dir=directory)()
    _reject_unknown_files(settings_cls, directory)
    return {name: value for name, value in found.items() if value}


def _reject_unknown_files(settings_cls: type[BaseSettings], directory: str) -> None:
    """Exit if a file is named like no setting: a default would be used instead of its secret.

    Kubernetes and engines keep directories and hidden files of their own in such a directory.
    """
    files = [path.name for path in Path(directory).iterdir() if path.is_file()]
    unknown = [name for name in files if name.lower() not in settings_cls.model_fields]
    visible = sorted(ascii(name) for name in unknown if not name.startswith("."))
    if visible:
        problem = f"has files that are named like no setting: {', '.join(visible)}"
        fail("SECRETS_DIR", directory, problem)


def _describe_error(error: Any) -> str:
    """Return one problem of pydantic's as `NAME=value: what it must be`."""
    if not error["loc"]:  # of several settings, which the text names
        return str(error["msg"]).removeprefix("Value error, ")
    name = error["loc"][0]
    is_secret = isinstance(Settings.model_fields[name].default, SecretStr)
    problem = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    return _describe(name.upper(), None if is_secret else error["input"], problem)


def _describe(name: str, value: object, problem: str) -> str:
    if value is None:
        return f"{name}: {problem}"
    without_credentials = ascii(str(value)).strip("'").rpartition("@")[2]
    return f"{name}={without_credentials[:SHOWN_CHARACTERS]}: {problem}"


def _exit(problems: list[str]) -> NoReturn:
    sys.exit(f"configuration error: {'; '.join(problems)}")


if __name__ == "__main__":
    load_settings()
