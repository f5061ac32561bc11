"""The internals of others that we lean on. A test that fails here after an upgrade says what to read again."""

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
from fastapi import FastAPI
from gunicorn.arbiter import Arbiter
from gunicorn.workers.base import Worker
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector
from redis.asyncio import BlockingConnectionPool
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.routing import Router
from uvicorn.config import Config
from uvicorn.lifespan.on import LifespanOn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import Server, ServerState
from uvicorn_worker import UvicornWorker

#: What we replace, or what our own code runs in the middle of: whatever changes there is to be read.
READ_AGAIN = {
    Arbiter.stop: ("master.py announces the end before it", "7138b6afd9c4"),
    Arbiter.reload: ("master.py replaces it", "fec344d2f774"),
    Arbiter.manage_workers: ("master.py raises `_num_workers` around it", "518f2dd040ef"),
    Arbiter.spawn_worker: ("master.py starts successors with it", "6abc0d90b0b9"),
    Arbiter.murder_workers: (
        "it sends SIGABRT, at which worker.py's stacks are written",
        "3f8fbfdf473f",
    ),
    Worker.init_process: ("it calls init_signals and run, in this order", "114caccd7a0e"),
    UvicornWorker.__init__: ("worker.py changes the config that it makes", "d51a1f9f91fd"),
    UvicornWorker._serve: ("worker.py replaces it", "eb799ef03d63"),
    UvicornWorker.init_signals: ("worker.py adds to it", "0c611981788f"),
    Server.serve: ("server.py replaces it", "112ef41af521"),
    Server._serve: (
        "it calls startup, on_tick and shutdown, which server.py replaces",
        "4575b7a50adf",
    ),
    Server.on_tick: ("server.py decides before it", "60ea49b06ccf"),
    Server.shutdown: (
        "server.py retires before it, and bounds it by timeout_graceful_shutdown",
        "9b33c5056299",
    ),
    Server._wait_tasks_to_complete: ("it waits for connections, then for tasks", "17209be1e991"),
    HttpToolsProtocol.data_received: (
        "protocol.py counts the bytes of a head around it",
        "010a7ae59a5d",
    ),
    HttpToolsProtocol.on_message_begin: (
        "protocol.py knows a new head by its new scope",
        "96d377fdc7c2",
    ),
    HttpToolsProtocol.on_headers_complete: (
        "protocol.py changes the cycle that it makes",
        "1ea8589acfad",
    ),
    HttpToolsProtocol.on_response_complete: ("answering.py replaces it", "64e254f28e38"),
    HttpToolsProtocol.connection_lost: ("answering.py adds to it", "c91a4c9bf2e2"),
    HttpToolsProtocol.on_header: (
        "protocol.py replaces the list that it appends to",
        "65d62c044f61",
    ),
    HttpToolsProtocol.on_body: ("it knows whose body it is by `cycle`", "dba9c32aeba3"),
    HttpToolsProtocol.shutdown: ("it closes what is idle, and lets answers finish", "d7351fa33f00"),
    RequestResponseCycle.__init__: ("protocol.py makes one for a refusal", "4d2f220910c3"),
    RequestResponseCycle.send: (
        "answering.py takes its writes, and holds the head",
        "abdd8601b326",
    ),
    RequestResponseCycle.receive: ("protocol.py wakes it when a body is refused", "8124ae006be7"),
    WebSocketsSansIOProtocol.shutdown: ("it closes with 1012", "e8ace796ada6"),
    LifespanOn.main: (
        "it fills the state that protocol.py reads the settings from",
        "699f9a37e3f8",
    ),
    Histogram.observe: ("metrics.py adds to its sum and buckets", "38beca3be1d1"),
    MultiProcessCollector.collect: ("metrics_server.py reads the folder with it", "86fc50ce2593"),
    FastAPI.build_middleware_stack: ("main.py takes its outermost layer off", "11dddac6c1b6"),
    vars(asyncpg.Connection)["_cancel_current_command"]: (
        "outage.py bounds the wait that it begins",
        "c96c8240531a",
    ),
    BlockingConnectionPool.get_connection_count: (
        "metrics.py takes idle and used, in this order",
        "fc3e24e630af",
    ),
}


def fingerprint(function: Callable[..., Any]) -> str:
    """Return a short hash of a function's source."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:12]


@pytest.mark.parametrize("function", READ_AGAIN, ids=lambda function: function.__qualname__)
def test_what_we_lean_on_is_as_we_read_it(function: Callable[..., Any]) -> None:
    why, expected = READ_AGAIN[function]
    message = f"{function.__module__}.{function.__qualname__} changed: {why}. Read both, then write the new hash here"
    assert fingerprint(function) == expected, message


def test_the_master_can_be_ours() -> None:
    arbiter = Arbiter.__new__(Arbiter)
    from app.serving.arbiter import ServiceArbiter

    arbiter.__class__ = ServiceArbiter
    assert arbiter.handle_usr2.__func__ is ServiceArbiter.handle_usr2
    assert (Arbiter.WORKERS, Arbiter.WORKER_BOOT_ERROR) == ({}, 3)


def test_a_server_has_what_ours_uses() -> None:
    state = ServerState()
    assert (state.total_requests, state.connections, state.tasks, state.default_headers) == (
        0,
        set(),
        set(),
        [],
    )
    server = Server(Config("app.main:app"))
    assert (server.started, server.should_exit) == (False, False)
    assert "self.servers" in inspect.getsource(Server.startup)
    assert "self.lifespan" in inspect.getsource(Server._serve)


def test_the_outermost_layer_is_the_one_that_main_takes_off() -> None:
    stack = FastAPI().build_middleware_stack()
    assert isinstance(stack, ServerErrorMiddleware)
    layer: Any = stack
    while hasattr(layer, "app") and not isinstance(layer, Router):
        layer = layer.app
    assert isinstance(layer, Router)


def test_a_histogram_has_a_sum_and_buckets_that_are_not_cumulated() -> None:
    registry = CollectorRegistry()
    child = Histogram("h", "", ["a"], buckets=(1, 2), registry=registry).labels("b")
    child._sum.inc(3)
    child._buckets[1].inc(2)
    samples = {
        f"{s.name}{s.labels.get('le', '')}": s.value
        for metric in registry.collect()
        for s in metric.samples
    }
    expected = {"h_bucket1.0": 0, "h_bucket2.0": 2, "h_bucket+Inf": 2, "h_count": 2, "h_sum": 3}
    assert expected.items() <= samples.items()


def test_files_of_values_can_be_read_and_added_to(tmp_path: Any) -> None:
    file = MmapedDict(str(tmp_path / "counter_1.db"))
    file.write_value("key", 2.0, 0.0)
    assert file.read_value("key")[0] == 2
    file.close()
    ((key, value, _, _),) = MmapedDict.read_all_values_from_file(str(tmp_path / "counter_1.db"))
    assert (key, value) == ("key", 2)
