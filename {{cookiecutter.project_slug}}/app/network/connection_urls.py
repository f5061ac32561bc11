"""Validation of the URLs of Postgres, Redis and others, by the parsers of their clients.

No error contains a part of the URL other than the name of an option: a password with an unquoted
character can be anywhere.
"""

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import asyncpg
from asyncpg import connect_utils
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.connection import URL_QUERY_ARGUMENT_PARSERS
from redis.exceptions import RedisError

POSTGRES_FORM = "must be postgresql://user:password@host:port/database"
REDIS_FORM = "must be redis://:password@host:port/0"
AMQP_FORM = "must be amqp://user:password@host:port/vhost"  # jobs
#: Options that asyncpg reads. It sends all others to the server, as parameters of the session.
_ASYNCPG_OPTIONS = """
    host port dbname database user password passfile service target_session_attrs krbsrvname gsslib
    sslmode sslcert sslkey sslrootcert sslcrl sslpassword sslnegotiation ssl_min_protocol_version
    ssl_max_protocol_version
"""
#: Parameters that a session may set, of Postgres 14 to 18: `select name from pg_settings where
#: context in ('user', 'superuser', 'backend', 'superuser-backend')`, without developer options.
#: Of any other version: `options=-c name=value`.
_SERVER_PARAMETERS = """
    application_name array_nulls backend_flush_after backslash_quote bytea_output
    check_function_bodies client_connection_check_interval client_encoding client_min_messages
    commit_delay commit_siblings compute_query_id constraint_exclusion cpu_index_tuple_cost
    cpu_operator_cost cpu_tuple_cost createrole_self_grant cursor_tuple_fraction datestyle
    deadlock_timeout debug_parallel_query default_statistics_target default_table_access_method
    default_tablespace default_text_search_config default_toast_compression
    default_transaction_deferrable default_transaction_isolation default_transaction_read_only
    dynamic_library_path effective_cache_size effective_io_concurrency enable_async_append
    enable_bitmapscan enable_distinct_reordering enable_gathermerge enable_group_by_reordering
    enable_hashagg enable_hashjoin enable_incremental_sort enable_indexonlyscan enable_indexscan
    enable_material enable_memoize enable_mergejoin enable_nestloop enable_parallel_append
    enable_parallel_hash enable_partition_pruning enable_partitionwise_aggregate
    enable_partitionwise_join enable_presorted_aggregate enable_self_join_elimination
    enable_seqscan enable_sort enable_tidscan escape_string_warning event_triggers exit_on_error
    extension_control_path extra_float_digits file_copy_method force_parallel_mode
    from_collapse_limit geqo geqo_effort geqo_generations geqo_pool_size geqo_seed
    geqo_selection_bias geqo_threshold gin_fuzzy_search_limit gin_pending_list_limit
    hash_mem_multiplier icu_validation_level idle_in_transaction_session_timeout
    idle_session_timeout intervalstyle io_combine_limit jit jit_above_cost jit_inline_above_cost
    jit_optimize_above_cost join_collapse_limit lc_messages lc_monetary lc_numeric lc_time
    lo_compat_privileges local_preload_libraries lock_timeout log_connections log_disconnections
    log_duration log_error_verbosity log_executor_stats log_lock_failures log_lock_waits
    log_min_duration_sample log_min_duration_statement log_min_error_statement log_min_messages
    log_parameter_max_length log_parameter_max_length_on_error log_parser_stats
    log_planner_stats log_replication_commands log_statement log_statement_sample_rate
    log_statement_stats log_temp_files log_transaction_sample_rate logical_decoding_work_mem
    maintenance_io_concurrency maintenance_work_mem max_parallel_maintenance_workers
    max_parallel_workers max_parallel_workers_per_gather max_stack_depth md5_password_warnings
    min_parallel_index_scan_size min_parallel_table_scan_size operator_precedence_warning
    options parallel_leader_participation parallel_setup_cost parallel_tuple_cost
    password_encryption plan_cache_mode quote_all_identifiers random_page_cost
    recursive_worktable_factor replication restrict_nonsystem_relation_kind role row_security
    scram_iterations search_path seq_page_cost session_authorization session_preload_libraries
    session_replication_role standard_conforming_strings statement_timeout
    stats_fetch_consistency synchronize_seqscans synchronous_commit tcp_keepalives_count
    tcp_keepalives_idle tcp_keepalives_interval tcp_user_timeout temp_buffers temp_file_limit
    temp_tablespaces timezone timezone_abbreviations track_activities track_cost_delay_timing
    track_counts track_functions track_io_timing track_wal_io_timing transaction_deferrable
    transaction_isolation transaction_read_only transaction_timeout transform_null_equals
    update_process_title vacuum_buffer_usage_limit vacuum_cost_delay vacuum_cost_limit
    vacuum_cost_page_dirty vacuum_cost_page_hit vacuum_cost_page_miss vacuum_failsafe_age
    vacuum_freeze_min_age vacuum_freeze_table_age vacuum_max_eager_freeze_failure_rate
    vacuum_multixact_failsafe_age vacuum_multixact_freeze_min_age
    vacuum_multixact_freeze_table_age vacuum_truncate wal_compression wal_init_zero wal_recycle
    wal_sender_timeout wal_skip_threshold work_mem xmlbinary xmloption zero_damaged_pages
"""
#: Options of redis-py that are texts. It converts those of `URL_QUERY_ARGUMENT_PARSERS`.
_REDIS_TEXT_OPTIONS = """
    client_name encoding encoding_errors host lib_name lib_version password path port username
"""
#: Arguments of asyncpg's parser, other than the URL.
_PARSER_ARGUMENTS = """
    host port user password passfile database ssl service servicefile direct_tls server_settings
    target_session_attrs krbsrvname gsslib
"""
# jobs: begin
_AMQP_NAME = r"[^\s/@?#:,\[\]]+|\[[\da-fA-F:.]+\]"
_AMQP_PORT = r"(:\d{1,5})?"
_AMQP_BASE = rf"amqps?://([^\s/@?#]*@)?({_AMQP_NAME}){_AMQP_PORT}(/[^\s@?#]*)?"
#: Options that aiormq and aio-pika read, with their values. They ignore all others, and use a
#: default in place of an invalid value.
AMQP_OPTIONS = {
    "heartbeat": r"\d{1,4}",
    "timeout": r"\d+",
    "name": r".+",
    "auth": r"(?i:plain|external)",
    "interleave": r"\d+",
    "happy_eyeballs_delay": r"\d+(\.\d+)?",
}
AMQP_TLS_OPTIONS = {
    "cafile": r".+",
    "capath": r".+",
    "cadata": r"[A-Za-z\d+/]+={0,2}",
    "certfile": r".+",
    "keyfile": r".+",
    "no_verify_ssl": r"[01]",
}

# jobs: end
ASYNCPG_OPTIONS = frozenset(_ASYNCPG_OPTIONS.split())
SERVER_PARAMETERS = frozenset(_SERVER_PARAMETERS.split())
REDIS_TEXT_OPTIONS = frozenset(_REDIS_TEXT_OPTIONS.split())


def check_postgres_url(url: str) -> None:
    """Raise `ValueError` unless asyncpg can use the URL. A missing file is no error here."""
    if not re.fullmatch(r"postgres(ql)?://\S+", url):
        raise ValueError(POSTGRES_FORM)
    base, names = _split(url, POSTGRES_FORM)
    if not _is_valid(_parse_postgres, base):
        raise ValueError(POSTGRES_FORM)
    _check_options(url, names, _is_postgres_option, _parse_postgres)


def check_replica_url(url: str) -> None:
    """Raise `ValueError` unless asyncpg can use the URL. An empty one stands for no replica."""
    if url:
        check_postgres_url(url)


def postgres_addresses(url: str) -> tuple[list[tuple[str, int]], str]:
    """Return the hosts with their ports, and `target_session_attrs`. Reads no certificate."""
    addresses, parameters = _parse(url, ssl=False, direct_tls=False)
    pairs = [(each, 0) if isinstance(each, str) else each for each in addresses]
    return pairs, parameters.target_session_attrs.value


def check_redis_url(url: str) -> None:
    """Raise `ValueError` unless redis-py can use the URL."""
    if not re.fullmatch(r"(rediss?|unix)://\S+", url):
        raise ValueError(REDIS_FORM)
    base, names = _split(url, REDIS_FORM)
    if not _is_valid(_parse_redis, base):
        raise ValueError(REDIS_FORM)
    _check_options(url, names, _is_redis_option, _parse_redis)


# jobs: begin
def check_amqp_url(url: str) -> None:
    """Raise `ValueError` unless aio-pika can use the URL. A missing file is no error here.

    An empty URL stands for no RabbitMQ.
    """
    if not url:
        return
    if not re.fullmatch(r"amqps?://\S+", url):
        raise ValueError(AMQP_FORM)
    base, names = _split(url, AMQP_FORM)
    if not _is_valid(_parse_amqp, base):
        raise ValueError(AMQP_FORM)
    tls = [name for name in names if name in AMQP_TLS_OPTIONS]
    if tls and not url.startswith("amqps:"):
        # aiormq would connect without TLS.
        msg = f"must be amqps:// for {' and '.join(tls)} after the question mark"
        raise ValueError(msg)
    _check_options(url, names, _is_amqp_option, _parse_amqp)


def _is_amqp_option(name: str) -> bool:
    return name in AMQP_OPTIONS or name in AMQP_TLS_OPTIONS


def _parse_amqp(url: str) -> None:
    base, _, query = url.partition("?")
    if not re.fullmatch(_AMQP_BASE, base) or urlsplit(base).port == 0:
        raise ValueError(AMQP_FORM)
    patterns = AMQP_OPTIONS | AMQP_TLS_OPTIONS
    for name, value in parse_qsl(query.replace("+", "%2B"), keep_blank_values=True):
        if not re.fullmatch(patterns[name], value):
            raise ValueError(name)


# jobs: end
def _split(url: str, form: str) -> tuple[str, list[str]]:
    """Return the URL without its options, and their names."""
    base, _, query = url.partition("?")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        raise ValueError(form) from None
    return base, [name for name, _ in pairs]


def _check_options(
    url: str, names: list[str], is_known: Callable[[str], bool], parse: Callable[[str], None]
) -> None:
    """Raise `ValueError` with the name of an option that is unknown, or has an invalid value."""
    base, _, query = url.partition("?")
    # With an @ in the options, it is rather a password with an unquoted question mark.
    unknown = [ascii(name).strip("'") for name in names if not is_known(name)]
    if unknown:
        shown = "" if "@" in query else f" {', '.join(unknown)}"
        msg = f"has an unknown option{shown} after the question mark"
        raise ValueError(msg)
    if _is_valid(parse, url):
        return
    pairs = zip(names, query.split("&"), strict=True)
    invalid = [name for name, pair in pairs if not _is_valid(parse, f"{base}?{pair}")]
    msg = f"has an invalid value of {' or '.join(invalid or names)} after the question mark"
    raise ValueError(msg)


def _is_valid(parse: Callable[[str], None], url: str) -> bool:
    try:
        parse(url)
    except OSError:  # a certificate, which may appear later
        return True
    except (ValueError, LookupError, TypeError, asyncpg.InterfaceError, RedisError):
        return False
    return True


def _is_postgres_option(name: str) -> bool:
    # With a dot it is of an extension.
    return name in ASYNCPG_OPTIONS or name.lower() in SERVER_PARAMETERS or "." in name


def _parse_postgres(url: str) -> None:
    addresses, _ = postgres_addresses(url)
    if not all(host and (0 < port < 65536 or host.startswith("/")) for host, port in addresses):
        raise ValueError(POSTGRES_FORM)
    try:
        _parse(url)
    except asyncpg.ClientConfigurationError as error:
        if "root certificate file" not in str(error):
            raise


def _parse(url: str, **arguments: Any) -> Any:
    """Return the addresses and the other parameters, as `asyncpg.connect` does it."""
    all_arguments = dict.fromkeys(_PARSER_ARGUMENTS.split()) | arguments
    return connect_utils._parse_connect_dsn_and_args(dsn=url, **all_arguments)  # type: ignore[attr-defined]


def _is_redis_option(name: str) -> bool:
    is_text = name in REDIS_TEXT_OPTIONS or name.startswith("ssl_")
    return is_text or name in URL_QUERY_ARGUMENT_PARSERS


def _parse_redis(url: str) -> None:
    parts = urlsplit(url)
    is_socket = parts.scheme == "unix"
    # redis-py itself would use database 0, and port 6379.
    if not is_socket and (not re.fullmatch(r"/?\d*/?", parts.path) or parts.port == 0):
        raise ValueError(REDIS_FORM)
    if "," in (parts.hostname or ""):
        raise ValueError(REDIS_FORM)
    pool: Any = BlockingConnectionPool.from_url(url)
    pool.make_connection()
