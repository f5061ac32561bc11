"""The authenticated caller of a request: its name, and its rights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import HTTPConnection


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller, as its token describes it. Without authentication, `ANONYMOUS`.

    The claims may be personal data, so no `repr` has them.
    """

    #: The user or the client: unique within the issuer, and never reused (RFC 9068, section 2.2).
    subject: str
    issuer: str = ""
    #: The client that got the token, which is the subject itself without a user.
    client_id: str = ""
    scopes: frozenset[str] = frozenset()
    #: All claims of the token, for what is not above.
    claims: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


#: The caller of a service that authenticates nobody. It may do everything.
ANONYMOUS = Principal("")


def principal_of(connection: HTTPConnection) -> Principal:
    """Return the caller of a request, `ANONYMOUS` if it is not authenticated.

    Its subject scopes idempotency keys and rate limits. An authentication of a team's own sets
    `request.state.principal` to a `Principal`, or to the text of a subject.
    """
    found = connection.scope.get("state", {}).get("principal")
    if isinstance(found, Principal):
        return found
    return Principal(str(found)) if found else ANONYMOUS
