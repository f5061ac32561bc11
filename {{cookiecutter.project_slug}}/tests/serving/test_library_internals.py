"""Library internals that the service relies on; a failure identifies code to review."""

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import uvloop
from anyio._backends._asyncio import AsyncIOBackend
from asyncpg import connect_utils
from asyncpg.pool import PoolConnectionHolder, PoolConnectionProxy
from fastapi import FastAPI, routing
from fastapi.dependencies import utils as dependencies
from fastapi.dependencies.models import Dependant, _get_cache_key
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from fastapi.routing import APIRoute, APIRouter, iter_route_contexts
from fastapi.telemetry._asgi import ExceptionTelemetryMiddleware
from gunicorn.arbiter import Arbiter
from gunicorn.workers.base import Worker
from joserfc.jws import JWSRegistry
from opentelemetry.exporter.http.transport._requests import RequestsHTTPTransport
from opentelemetry.exporter.otlp.common.http import _OTLPHTTPClient
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk._shared_internal import BatchProcessor
from opentelemetry.sdk.trace import Tracer
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from prometheus_client import CollectorRegistry, Histogram, values
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.values import MultiProcessValue
from redis._parsers.base import BaseParser
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.connection import AbstractConnection
from starlette._exception_handler import wrap_app_handling_exceptions
from starlette._utils import get_route_path
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.routing import Mount, Route, Router
from uvicorn.config import Config
from uvicorn.lifespan.on import LifespanOn
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware, _TrustedHosts
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import Server, ServerState
from uvicorn_worker import UvicornWorker
from websockets.server import ServerProtocol

from app.serving.arbiter import ServiceArbiter
from app.telemetry.metric_files import MetricFile, encode_entries, read_entries

Function = Callable[..., Any]

#: Functions that the service overrides, or that call its code: why, and the hash of the source.
REVIEWED: dict[Function, tuple[str, str]] = {
    # gunicorn
    Arbiter.stop: ("arbiter.py announces the shutdown before it", "7138b6afd9c4"),
    Arbiter.reload: ("arbiter.py replaces it", "fec344d2f774"),
    Arbiter.manage_workers: ("arbiter.py raises `_num_workers` around it", "518f2dd040ef"),
    Arbiter.spawn_worker: ("arbiter.py starts replacements with it", "6abc0d90b0b9"),
    Arbiter.murder_workers: (
        "it sends SIGABRT, at which gunicorn_worker.py has the stacks written",
        "3f8fbfdf473f",
    ),
    Worker.init_process: ("it calls init_signals and run, in this order", "114caccd7a0e"),
    # uvicorn_worker
    UvicornWorker.__init__: ("gunicorn_worker.py changes its config", "d51a1f9f91fd"),
    UvicornWorker._serve: ("gunicorn_worker.py replaces it", "eb799ef03d63"),
    UvicornWorker.run: ("gunicorn_worker.py replaces it", "00ca1919b3ed"),
    UvicornWorker.init_signals: ("gunicorn_worker.py adds to it", "0c611981788f"),
    # uvicorn: the server
    Server.serve: ("server.py replaces it", "112ef41af521"),
    Server._serve: (
        "it calls startup, on_tick and shutdown, which server.py replaces",
        "4575b7a50adf",
    ),
    Server.main_loop: ("server.py replaces it", "afccb353a119"),
    Server.on_tick: ("server.py decides before it, once a second", "60ea49b06ccf"),
    Server.shutdown: (
        "server.py retires before it, and bounds it by timeout_graceful_shutdown",
        "9b33c5056299",
    ),
    Server._wait_tasks_to_complete: ("it waits for connections, then for tasks", "17209be1e991"),
    LifespanOn.main: ("it fills the state that each request copies", "699f9a37e3f8"),
    # uvicorn: HTTP
    HttpToolsProtocol.__init__: ("http_protocol.py makes the same parser", "4f0899941034"),
    HttpToolsProtocol.data_received: ("http_protocol.py replaces it", "010a7ae59a5d"),
    HttpToolsProtocol.handle_websocket_upgrade: ("http_protocol.py replaces it", "179c4f769386"),
    HttpToolsProtocol._start_asgi_task: ("http_response.py replaces it", "9c08c2571ae9"),
    HttpToolsProtocol.on_message_complete: ("it asks `_should_upgrade`", "1fbad42dc31f"),
    HttpToolsProtocol.on_message_begin: (
        "http_protocol.py detects a new request by its new scope",
        "96d377fdc7c2",
    ),
    HttpToolsProtocol.on_headers_complete: (
        "http_protocol.py changes the cycle that it makes",
        "1ea8589acfad",
    ),
    HttpToolsProtocol.on_header: (
        "http_protocol.py replaces the list that it appends to",
        "65d62c044f61",
    ),
    HttpToolsProtocol.on_body: ("it adds the body to the newest `cycle`", "dba9c32aeba3"),
    HttpToolsProtocol.on_response_complete: ("http_response.py replaces it", "64e254f28e38"),
    HttpToolsProtocol.connection_lost: ("http_response.py adds to it", "c91a4c9bf2e2"),
    HttpToolsProtocol.shutdown: (
        "it closes idle connections, and lets responses finish",
        "d7351fa33f00",
    ),
    RequestResponseCycle.__init__: ("http_protocol.py makes one for a rejection", "4d2f220910c3"),
    RequestResponseCycle.send: (
        "it writes to http_response.py, which keeps the headers",
        "abdd8601b326",
    ),
    RequestResponseCycle.run_asgi: (
        "it logs an incomplete response, unless the client has disconnected",
        "0f33f2449a44",
    ),
    RequestResponseCycle.receive: (
        "http_protocol.py wakes it when a body is rejected",
        "8124ae006be7",
    ),
    # uvicorn: WebSocket
    WebSocketsSansIOProtocol.handle_connect: (
        "websocket_protocol.py calls it with a request of its own, and changes its scope",
        "fc648c2161ff",
    ),
    WebSocketsSansIOProtocol.handle_parser_exception: ("it requires a close frame", "ff5cf13c764f"),
    ServerProtocol.parse: ("it parses a request before the frames", "70dba1c6c9bf"),
    ServerProtocol.accept: ("websocket_protocol.py negotiates with it", "cd815e1b95a6"),
    WebSocketsSansIOProtocol.shutdown: ("it closes with 1012", "e8ace796ada6"),
    # prometheus_client
    Histogram.observe: (
        "http_metrics.py and process_metrics.py add to its sum and buckets",
        "38beca3be1d1",
    ),
    MultiProcessCollector._read_metrics: ("multiprocess.py reads files as it does", "c8d3db164cc9"),
    MultiProcessCollector._accumulate_metrics: ("multiprocess.py merges with it", "a7834784c48c"),
    MultiProcessValue: (
        "it makes, reads, writes and closes metric_files.py's MetricFile, by pid",
        "8077cd2c482f",
    ),
    MmapedDict._init_value: ("metric_files.py writes entries as it does", "b07be9310c27"),
    MmapedDict.read_all_values_from_file: ("metric_files.py reads files with it", "949b6512ed6a"),
    # FastAPI
    FastAPI.build_middleware_stack: (
        "application.py removes its outermost middleware",
        "11dddac6c1b6",
    ),
    FastAPI.__call__: ("application.py does what it does without telemetry", "0795712e5427"),
    ServerErrorMiddleware.__call__: (
        "application.py removes it if it would do nothing",
        "a7d082263a5c",
    ),
    ExceptionTelemetryMiddleware.__call__: (
        "application.py removes it if it would do nothing",
        "f00be47366e9",
    ),
    iter_route_contexts: ("routes.py finds the routes of included routers with it", "087db59981fa"),
    # FastAPI: the choice of a route
    APIRouter.app: ("directory.py chooses the same route before it", "846f80e0a124"),
    routing._IncludedRouter._match: ("directory.py matches as it does", "8dc217b8fa3b"),
    routing._IncludedRouter._handle_selected: (
        "directory.py adds the same keys to the scope",
        "a808ac2650e1",
    ),
    routing._IncludedRouter.effective_candidates: (
        "directory.py has the routes of nested routers from it",
        "4f34ecd04857",
    ),
    routing._EffectiveRouteContext.matches: (
        "directory.py asks it in place of the original route",
        "7bf5e9ac8d5e",
    ),
    APIRoute.matches: ("directory.py serves only routes that match by it", "b97ea9942fe1"),
    APIRoute.handle: ("it serves the route that directory.py adds to the scope", "6522436750d8"),
    # FastAPI: a request of a route
    routing._EffectiveRouteContext.from_api_route: (
        "it calls get_route_handler with the dependencies of including routers, in a variable",
        "bf247f1a8aa8",
    ),
    routing.request_response: ("quick_route.py does without it", "69a7733a6238"),
    AsyncExitStackMiddleware.__call__: (
        "directory.py calls it for FastAPI's routes, in front of the router's",
        "8868205fc630",
    ),
    wrap_app_handling_exceptions: (
        "quick_route.py and directory.py call it once an exception is raised",
        "d5e41f0fa794",
    ),
    APIRoute.get_route_handler: ("quick_route.py adds to it", "0823a6823e97"),
    routing.get_request_handler: ("quick_route.py replaces what it returns", "86df3aeddb8e"),
    routing.serialize_response: ("quick_route.py serializes as it does", "69d99624855b"),
    routing._build_response_args: ("quick_route.py has the same status", "f456f86fd758"),
    routing._extract_endpoint_context: ("quick_route.py reports errors with it", "c03793914323"),
    dependencies.solve_dependencies: (
        "quick_plan.py calls dependencies in the same order, once or again",
        "19825365bd06",
    ),
    dependencies.get_validation_alias: (
        "quick_plan.py reads parameters of the path by it",
        "b4d0648637da",
    ),
    dependencies.request_params_to_args: ("quick_plan.py validates with it", "e028df88c5ea"),
    dependencies.request_body_to_args: (
        "quick_plan.py validates a body as it does",
        "8ae56248184c",
    ),
    _get_cache_key: ("quick_plan.py calls a function once per key of it", "eba06ac99846"),
    # joserfc
    JWSRegistry.get_alg: (
        "auth/tokens.py allows by the same list, without its warning of EdDSA",
        "50586c1ef5a6",
    ),
    # Starlette
    Starlette.__call__: ("application.py does the same in its place", "5bf3135c4e85"),
    Router.__call__: ("it calls `middleware_stack`, which is the directory", "e93fc286faea"),
    ExceptionMiddleware.__call__: (
        "directory.py serves routes in front of it, with its handlers",
        "c0b5cb274777",
    ),
    Route.matches: ("directory.py serves only routes that match by it", "4de50d376de0"),
    get_route_path: ("directory.py removes the root path with it", "243011d2a68c"),
    Mount.matches: ("routes.py recognizes a mount by `app_root_path`", "ac97bc77afea"),
    CORSMiddleware.send: ("cors.py adds the headers that it would add", "e6a44d3c8aba"),
    # anyio
    AsyncIOBackend.run_sync_in_worker_thread: (
        "threads.py relies on its shielded scope, and on its limiter",
        "65f1902c1314",
    ),
    # uvicorn: proxy headers
    ProxyHeadersMiddleware.__call__: ("proxies.py replaces its trusted hosts", "b601df964c02"),
    _TrustedHosts.__init__: (
        "it caches `_compute_trust`, which proxies.py overrides",
        "6470d2577cb2",
    ),
    _TrustedHosts.__contains__: ("proxies.py adds clients without an address", "c91fce85486c"),
    # asyncpg
    vars(asyncpg.Connection)["_cancel_current_command"]: (
        "postgres_errors.py bounds the wait that it begins",
        "c96c8240531a",
    ),
    vars(asyncpg.Connection)["_drop_global_statement_cache"]: (
        "pool.py is the `_proxy._holder._pool` of its connections",
        "10e14c02b0d4",
    ),
    vars(asyncpg.Connection)["_on_release"]: (
        "pool.py calls it, as asyncpg's pool does",
        "cf495810a0f2",
    ),
    vars(asyncpg.Connection)["_reset"]: (
        "pool.py waits for cancellations before, so that it logs no transaction that ends",
        "3252aa6d5b0e",
    ),
    vars(asyncpg.Connection)["_execute"]: (
        "while it runs, `_stmt_exclusive_section` is acquired, which pool.py reads",
        "d91539665074",
    ),
    PoolConnectionProxy.__init__: ("pool.py lends with it, as its `_holder`", "464d65eb2235"),
    vars(PoolConnectionProxy)["_detach"]: ("pool.py takes back with it", "02f6b387a6f7"),
    PoolConnectionHolder.release: ("pool.py replaces it, and checks the same", "a8af808680d4"),
    vars(connect_utils)["_parse_connect_dsn_and_args"]: (
        "connection_urls.py validates with it, and reads the hosts",
        "b8013c6fb220",
    ),
    # redis-py
    BlockingConnectionPool.get_connection_count: (
        "process_metrics.py reads idle and used, in this order",
        "fc3e24e630af",
    ),
    BlockingConnectionPool.get_connection: (
        "it calls ensure_connection, before which storage/redis.py closes old connections",
        "6382c8e6cc28",
    ),
    BlockingConnectionPool.ensure_connection: (
        "it connects where a connection is closed",
        "d144a7b72ed3",
    ),
    ConnectionPool.release: ("it closes a connection that is marked for reconnect", "e7d317be9fa6"),
    AbstractConnection.connect_check_health: (
        "it calls on_connect_check_health, after which storage/redis.py has the time",
        "5cfa2c49e83e",
    ),
    AbstractConnection.read_response: (
        "it raises the errors that storage/redis.py looks at",
        "c1b374bc1a30",
    ),
    BaseParser.parse_error: (
        "it sets `status_code`, and removes the code from the text",
        "66c735931d7e",
    ),
    Redis.execute_command: ("all commands pass through it, for traced_redis.py", "b35fa092ad03"),
    Pipeline.execute: ("traced_redis.py puts a span around it", "f61e1ae2ffba"),
    Redis.pipeline: ("traced_redis.py makes the same pipeline", "15119889197c"),
    # OpenTelemetry
    Tracer.start_span: ("tracing.py decides in its place, and hands over the IDs", "3cd55e4a9e14"),
    TraceIdRatioBased.should_sample: ("tracing.py decides by the same rule", "f8786d237e5e"),
    ParentBased.should_sample: ("tracing.py decides by the same rule", "2f4e7c936dc7"),
    BatchProcessor.shutdown: (
        "trace_export.py runs it in a thread: it waits for 30 s",
        "8f6ff946caa3",
    ),
    BatchProcessor.emit: (
        "it drops the oldest span of a full queue, with a log line",
        "221acffa5dba",
    ),
    OTLPSpanExporter.export: (
        "it returns a failure, and raises nothing; its module's `encode_spans` is replaced",
        "0968825cd72f",
    ),
    _OTLPHTTPClient.export: ("its retries end within the timeout", "2641348a8823"),
    RequestsHTTPTransport.request: (
        "it calls the session's method, which trace_export.py overrides",
        "7e35777edf9a",
    ),
}


def fingerprint(function: Function) -> str:
    """Return a short hash of a function's source."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:12]


def name_of(function: Function) -> str:
    return function.__qualname__


@pytest.mark.parametrize("function", REVIEWED, ids=name_of)
def test_library_internals_are_unchanged(function: Function) -> None:
    reason, expected = REVIEWED[function]
    changed = f"{function.__module__}.{function.__qualname__} changed: {reason}."
    assert fingerprint(function) == expected, f"{changed} Review both, then update the hash here."


def test_arbiter_class_can_be_replaced() -> None:
    arbiter = Arbiter.__new__(Arbiter)
    arbiter.__class__ = ServiceArbiter
    assert arbiter.handle_usr2.__func__ is ServiceArbiter.handle_usr2
    assert Arbiter.WORKERS == {}
    assert Arbiter.WORKER_BOOT_ERROR == 3


def test_event_loop_has_a_descriptor() -> None:
    """A forked child must not use it."""
    loop: Any = uvloop.new_event_loop()
    assert loop._get_backend_id() > 2
    loop.close()


def test_server_has_the_expected_attributes() -> None:
    state = ServerState()
    assert state.total_requests == 0
    assert state.connections == set()
    assert state.tasks == set()
    assert state.default_headers == []
    server = Server(Config("app.main:app"))
    assert server.started is False
    assert server.should_exit is False
    assert isinstance(server.server_state, ServerState)
    assert "self.servers" in inspect.getsource(Server.startup)
    assert "self.lifespan" in inspect.getsource(Server._serve)


def test_outermost_middleware_is_server_error_middleware() -> None:
    """Below it, each layer has the next one in `app`, down to the router."""
    stack = FastAPI().build_middleware_stack()
    assert isinstance(stack, ServerErrorMiddleware)
    assert isinstance(stack.app, ExceptionTelemetryMiddleware)
    layer: Any = stack
    while hasattr(layer, "app") and not isinstance(layer, Router):
        layer = layer.app
    assert isinstance(layer, Router)


def test_functions_of_routes_have_the_known_fields() -> None:
    """A plan of quick_plan.py leaves a function to FastAPI that uses any field but these."""
    known = {"path_params", "query_params", "header_params", "cookie_params", "dependencies"}
    known |= {"body_params", "name", "call", "request_param_name", "use_cache", "path", "scope"}
    known |= {"http_connection_param_name", "own_oauth_scopes", "parent_oauth_scopes"}
    unknown = {"websocket_param_name", "security_scopes_param_name"}
    unknown |= {"response_param_name", "background_tasks_param_name", "concurrency"}
    assert {field.name for field in fields(Dependant)} == known | unknown


def test_histogram_buckets_are_not_cumulative() -> None:
    registry = CollectorRegistry()
    histogram = Histogram("h", "", ["a"], buckets=(1, 2), registry=registry)
    child = histogram.labels("b")
    child._sum.inc(3)
    child._buckets[1].inc(2)
    found = {}
    for metric in registry.collect():
        for sample in metric.samples:
            found[sample.name + sample.labels.get("le", "")] = sample.value
    expected = {"h_bucket1.0": 0, "h_bucket2.0": 2, "h_bucket+Inf": 2, "h_count": 2, "h_sum": 3}
    assert expected.items() <= found.items()


def test_metric_files_have_the_format_of_prometheus_client(tmp_path: Path) -> None:
    ours = MetricFile(str(tmp_path / "ours.db"))
    theirs = MmapedDict(str(tmp_path / "theirs.db"))
    for key in ("1234", "12345678901", "é"):
        for file in (ours, theirs):
            file.read_value(key)
            file.write_value(key, 2.0, 3.0)
    ours.close()
    theirs.close()
    expected = MmapedDict.read_all_values_from_file(theirs._fname)
    assert list(MmapedDict.read_all_values_from_file(ours.path)) == list(expected)
    entries = read_entries(Path(ours.path))
    archive = tmp_path / "archive.db"
    archive.write_bytes(encode_entries(entries))
    assert read_entries(archive) == entries


def test_metric_files_replace_those_of_prometheus_client() -> None:
    """`MultiProcessValue` looks the class up in its module, for each file that it makes."""
    assert vars(values)["MmapedDict"] is MetricFile
