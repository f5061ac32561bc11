"""Measure what authentication costs a request: `python -m auth_figures ROUNDS REQUESTS`.

It runs in the service's environment, with AUTH_ISSUER and AUTH_AUDIENCE, and needs neither a
provider nor a network: the keys are put in place. All variants are served in alternating rounds
within one process, through the service's protocol but no socket. Prints Markdown.
"""

import asyncio
import base64
import gc
import importlib
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvloop
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from in_process import ResponseTransport, make_protocol, prepare_service, stop_background_tasks

WARM_UP_REQUESTS = 200
#: Requests at the start of each round that are not measured.
FIRST_REQUESTS = 5
KID = "key-1"
PRIVATE_KEY = rsa.generate_private_key(65537, 2048)
Tokens = Iterator[str]


def to_base64(data: bytes) -> str:
    """Return base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def mint(number: int) -> str:
    """Return a token of 700 bytes, as a provider sends it."""
    now = int(time.time())
    header = {"alg": "RS256", "typ": "at+jwt", "kid": KID}
    claims = {
        "iss": os.environ["AUTH_ISSUER"],
        "aud": os.environ["AUTH_AUDIENCE"],
        "sub": "248289761001",
        "client_id": "s6BhdRkqt3",
        "scope": "orders:read orders:write profile",
        "iat": now,
        "exp": now + 3600,
        "jti": f"dbe39bf3-a3ba-4238-a513-{number:012}",
    }
    data = ".".join(to_base64(json.dumps(each).encode()) for each in (header, claims))
    signature = PRIVATE_KEY.sign(data.encode(), padding.PKCS1v15(), SHA256())
    return f"{data}.{to_base64(signature)}"


def create_app(issuer: str) -> Any:
    """Return the service with a route that requires a token and one that does not."""
    if issuer:
        os.environ["AUTH_ISSUER"] = issuer
    else:
        os.environ.pop("AUTH_ISSUER")
        os.environ.pop("AUTH_AUDIENCE")
    fastapi: Any = importlib.import_module("fastapi")
    main: Any = importlib.import_module("app.main")
    settings: Any = importlib.import_module("app.settings")
    dependencies: Any = importlib.import_module("app.auth.dependencies")
    quick: Any = importlib.import_module("app.web.quick_route")
    app = main.create_app(settings.load_settings())
    router = fastapi.APIRouter(route_class=quick.QuickRoute)

    @router.get("/open")
    async def open_() -> dict[str, int]:
        return {"a": 1}

    @router.get("/required", dependencies=[dependencies.require("orders:read")])
    async def required() -> dict[str, int]:
        return {"a": 1}

    app.include_router(router)
    return app


async def open_state(app: Any) -> dict[str, Any]:
    """Return the state of a process, whose keys are in place if authentication is on."""
    # Never closed: this process exits without it.
    state: dict[str, Any] = await app.router.lifespan_context(app).__aenter__()
    await stop_background_tasks()
    if state["authenticator"] is not None:
        jwks: Any = importlib.import_module("app.auth.jwks")
        numbers = PRIVATE_KEY.public_key().public_numbers()
        members = {"n": numbers.n.to_bytes(256), "e": numbers.e.to_bytes(3)}
        jwk = {"kty": "RSA", "kid": KID}
        jwk |= {name: to_base64(value) for name, value in members.items()}
        keys, _ = jwks.parse_keys(json.dumps({"keys": [jwk]}).encode())
        state["authenticator"].verify.__self__.keys.keys = keys
    return dict(state)


class Variant:
    """Requests of one kind, over one connection."""

    def __init__(self, protocol: Any, path: str, tokens: Tokens | None) -> None:
        """Without tokens the requests have none."""
        self.protocol = protocol
        self.path = path
        self.tokens = tokens
        self.transport = ResponseTransport()
        protocol.connection_made(self.transport)
        self.microseconds: list[float] = []

    async def run(self, number: int) -> None:
        """Send requests one after the other; note the CPU time of each.

        Those before the clock starts fill the caches, which the variant before has emptied.
        """
        await self.send([self.request() for _ in range(FIRST_REQUESTS)])
        requests = [self.request() for _ in range(number)]
        start = time.process_time()
        await self.send(requests)
        seconds = time.process_time() - start
        if not self.transport.received.startswith(b"HTTP/1.1 200"):
            sys.exit(f"{self.path}: {self.transport.received[:300]!r}")
        self.microseconds.append(seconds / number * 1e6)

    async def send(self, requests: list[bytes]) -> None:
        """Send requests, each after the response to the one before."""
        for request in requests:
            response = self.transport.expect()
            self.protocol.data_received(request)
            await response
            await asyncio.sleep(0)

    def request(self) -> bytes:
        """Return the bytes of a request."""
        token = f"Authorization: Bearer {next(self.tokens)}\r\n" if self.tokens else ""
        return f"GET {self.path} HTTP/1.1\r\nHost: a\r\n{token}\r\n".encode()


async def measure(rounds: int, requests: int) -> dict[str, Variant]:
    """Serve all variants in alternating rounds."""
    on = create_app(os.environ["AUTH_ISSUER"])
    state_on = await open_state(on)
    known = mint(0)
    number = WARM_UP_REQUESTS + rounds * requests + (rounds + 1) * FIRST_REQUESTS
    minted = [mint(each) for each in range(1, number + 1)]
    off = create_app("")
    state_off = await open_state(off)
    make: dict[str, Callable[[], Variant]] = {
        "none": lambda: Variant(make_protocol(on, state_on), "/open", None),
        "sent": lambda: Variant(make_protocol(on, state_on), "/open", itertools.repeat(known)),
        "known": lambda: Variant(make_protocol(on, state_on), "/required", itertools.repeat(known)),
        "new": lambda: Variant(make_protocol(on, state_on), "/required", iter(minted)),
        "off": lambda: Variant(make_protocol(off, state_off), "/open", None),
        "required": lambda: Variant(make_protocol(off, state_off), "/required", None),
    }
    variants = {name: create() for name, create in make.items()}
    for variant in variants.values():
        await variant.run(WARM_UP_REQUESTS)
        variant.microseconds.clear()
    gc.collect()
    gc.freeze()
    order = list(variants.values())
    for _ in range(rounds):
        # The one before leaves its traces in the caches and branch predictors of the processor.
        random.shuffle(order)
        for variant in order:
            await variant.run(requests)
    return variants


def table(variants: dict[str, Variant]) -> str:
    """Return the differences between variants, each by its quickest round.

    Whatever else the machine does only adds to a round, so many short ones find the cost itself.
    """
    quickest = {name: min(variant.microseconds) for name, variant in variants.items()}
    rows = [
        ("a known token, over a request without", "known", "none"),
        ("of that: to check it, not to receive it", "known", "sent"),
        ("a new RS256 token, over a request without", "new", "none"),
        ("off, where a route requires a token", "required", "off"),
    ]
    lines = ["| | us of CPU |", "|---|---|"]
    for title, more, less in rows:
        lines.append(f"| {title} | {quickest[more] - quickest[less]:.1f} |")
    note = f"A request without a token costs {quickest['none']:.0f} us here."
    return "\n".join([*lines, "", note, ""])


def main() -> None:
    """Measure, and print the table."""
    rounds, requests = map(int, sys.argv[1:])
    prepare_service()
    sys.stdout.write(table(uvloop.run(measure(rounds, requests))))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
