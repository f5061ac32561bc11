"""Authentication in routes: mandatory, or by router, route and scope.

    app = create_app(load_settings(), dependencies=[AUTHENTICATED])  # every route
    router = APIRouter(prefix="/orders", dependencies=[require("orders:read")])

    @router.post("", dependencies=[require("orders:write")])
    async def create(principal: Principal) -> Order: ...

Without `AUTH_ISSUER` authentication is off: the caller is `ANONYMOUS`, and may do everything.
"""

import re
from typing import Annotated, Any

from fastapi import Security
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from starlette.requests import HTTPConnection

from app.auth import principal as principals
from app.auth.authenticator import Authenticator
from app.auth.errors import InsufficientScopeError
from app.web.document import SCHEME

_SCOPE = re.compile(r"[!#-\[\]-~]+")


class Authenticated(SecurityBase):
    """A dependency that returns the caller, if it has all scopes.

    It is a security scheme of the API document, so `/docs` has its "Authorize" button.
    """

    #: While it is None in the state, authentication is off: app/web/quick_route.py.
    switch = "authenticator"

    def __init__(self, *scopes: str) -> None:
        self.model = HTTPBearer(bearerFormat="JWT")
        self.scheme_name = SCHEME
        self.scopes = frozenset(scopes)

    async def __call__(self, connection: HTTPConnection) -> principals.Principal:
        """Return the caller of a request or of a WebSocket.

        Raises an error of `app.auth.errors`, and `KeyError` without the application's lifespan:
        nobody passes while it is not known whether authentication is on.
        """
        scope = connection.scope
        state = scope["state"]
        authenticator: Authenticator | None = state["authenticator"]
        if state.get("principal") is not None:
            # Another dependency of the route has authenticated it, or middleware of the team.
            caller = principals.principal_of(connection)
        elif authenticator is not None:
            caller = authenticator.recall(scope) or await authenticator.authenticate(scope)
        else:
            return principals.ANONYMOUS
        if authenticator is not None and not self.scopes <= caller.scopes:
            raise InsufficientScopeError(authenticator.realm, self.scopes)
        return caller


def require(*scopes: str) -> Any:
    """Return a dependency that lets only callers pass that have all of the scopes.

    Raises `ValueError` for what is no scope, such as two in one text (RFC 6749, section 3.3).
    """
    for each in scopes:
        if not _SCOPE.fullmatch(each):
            msg = f"{each!r} is not a scope"
            raise ValueError(msg)
    return Security(Authenticated(*scopes), scopes=list(scopes))


#: A dependency that lets only authenticated callers pass, of whatever scopes.
AUTHENTICATED = require()
#: The type of a route's parameter, which makes authentication mandatory for the route.
Principal = Annotated[principals.Principal, AUTHENTICATED]
