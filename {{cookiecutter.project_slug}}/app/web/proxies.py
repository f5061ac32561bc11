"""Proxy headers and addresses of clients: which proxies are trusted, and which is the client."""

import ipaddress
from typing import Any

from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware, _TrustedHosts


def without_ipv4_mapping(host: str) -> str:
    """Return the IPv4 address of `::ffff:192.0.2.1`, any other host unchanged.

    A socket on `[::]` reports clients of IPv4 in this form (RFC 4291, section 2.5.5.2).
    """
    if ":" not in host:
        return host
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        return host
    return str(address.ipv4_mapped or host)


def client_address(client: tuple[str, int] | None) -> tuple[str, int] | None:
    """Return the address and port of a connection's client, None on a unix socket."""
    return (without_ipv4_mapping(client[0]), client[1]) if client else None


def with_proxy_headers(app: ASGIApp, trusted: str) -> ASGIApp:
    """Return the application behind proxy headers, which only `trusted` addresses may set."""
    middleware: Any = ProxyHeadersMiddleware(app)  # type: ignore[arg-type]
    middleware.trusted_hosts = TrustedProxies(trusted)
    return middleware  # type: ignore[no-any-return]


class TrustedProxies(_TrustedHosts):
    """Addresses of trusted proxies, among them every client of a unix socket.

    Such a client has no address. It is a process of this host that the permissions of the socket
    admit. gunicorn too allows it unconditionally: see its setting `forwarded_allow_ips`.
    """

    def __contains__(self, host: str | None) -> bool:
        return host is None or super().__contains__(host)

    def _compute_trust(self, host: str) -> bool:
        return super()._compute_trust(without_ipv4_mapping(host))

    def get_trusted_client_address(self, x_forwarded_for: str) -> tuple[str, int]:
        """Return the address and the port of the client."""
        host, port = super().get_trusted_client_address(x_forwarded_for)
        return without_ipv4_mapping(host), port
