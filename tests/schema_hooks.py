"""Hooks for schemathesis: rules that an OpenAPI document cannot express."""

import os
import re
from typing import Any
from uuid import uuid4

import schemathesis

#: FastAPI writes the bounds of numbers as floats: an exact reader sees 2**63 as this.
ROUNDED = 9223372036854776000
KEY = re.compile(r'"[ -~]{1,255}"|[ -~]{1,255}')
#: The environment variable with the header of a service that requires a token.
AUTHORIZATION = "SCHEMATHESIS_AUTHORIZATION"


def renew_key(case: Any) -> None:
    """Replace a valid idempotency key by a new one, as a client does for each payment.

    The service correctly rejects a key that was used with a different request.
    """
    for name, value in list((case.headers or {}).items()):
        if name.lower() == "idempotency-key" and KEY.fullmatch(str(value)):
            case.headers[name] = str(uuid4())


def fit_amount(body: dict[str, Any]) -> None:
    """Make the amount an integer of 64 bits: for JSON Schema, 1.0 is an integer too."""
    amount = body.get("amount")
    if isinstance(amount, float) and amount.is_integer():
        amount = int(amount)
        body["amount"] = amount
    if isinstance(amount, int) and 2**63 <= amount < ROUNDED:
        body["amount"] = 2**63 - 1


def fit_reference(body: dict[str, Any]) -> None:
    """Replace unprintable characters: JSON Schema cannot exclude them."""
    reference = body.get("reference")
    if isinstance(reference, str):
        body["reference"] = "".join(each if each.isprintable() else "x" for each in reference)


@schemathesis.hook
def before_call(_: Any, case: Any, __: Any) -> None:
    """Adapt each generated call before it is sent."""
    renew_key(case)
    body = case.body if isinstance(case.body, dict) else {}
    fit_amount(body)
    fit_reference(body)


class Token:
    """The token of each case but those that check whether the service requires it."""

    def get(self, *_: Any) -> str:
        """Return the header."""
        return os.environ[AUTHORIZATION]

    def set(self, case: Any, data: str, _: Any) -> None:
        """Add the header to a case."""
        case.headers = {**(case.headers or {}), "Authorization": data}


if AUTHORIZATION in os.environ:
    schemathesis.auth()(Token)
