"""What schemathesis cannot know of the service: its `SCHEMATHESIS_HOOKS`."""

import re
from typing import Any
from uuid import uuid4

import schemathesis

#: FastAPI writes the bounds of numbers as floats: for those who read it exactly, 2**63 is this.
ROUNDED = 9223372036854776000


KEY = re.compile(r'"[ -~]{1,255}"|[ -~]{1,255}')


@schemathesis.hook
def before_call(_: Any, case: Any, __: Any) -> None:
    """Give each call a key of its own, as a client does: one that comes with another payment is refused, rightly."""
    for name, value in list((case.headers or {}).items()):
        if name.lower() == "idempotency-key" and KEY.fullmatch(str(value)):
            case.headers[name] = str(uuid4())
    body = case.body if isinstance(case.body, dict) else {}
    amount, reference = body.get("amount"), body.get("reference")
    if (
        isinstance(amount, float) and amount.is_integer()
    ):  # 1.0 is an integer for a schema, and not for us
        body["amount"] = amount = int(amount)
    if isinstance(amount, int) and 2**63 <= amount < ROUNDED:
        body["amount"] = 2**63 - 1
    if isinstance(reference, str):  # a schema has no word for what can be printed
        body["reference"] = "".join(each if each.isprintable() else "x" for each in reference)
