"""The API document: what routes respond that require a token.

While authentication is off they require none, so the document has no security scheme of its own.
"""

from collections.abc import Iterator
from typing import Any

from app.web.problems import problem_responses

#: The name of the security scheme of app/auth.
SCHEME = "bearer"
_RESPONSES = {str(key): value for key, value in problem_responses(400, 401, 403, 503).items()}


def describe_authentication(document: dict[str, Any], is_on: bool) -> None:
    """Add the responses of authentication to a document, or remove its scheme while it is off."""
    if not is_on:
        schemes = document.get("components", {}).get("securitySchemes", {})
        schemes.pop(SCHEME, None)
        if not schemes:
            document.get("components", {}).pop("securitySchemes", None)
    for operation in _operations(document):
        requirements = operation.get("security", [])
        if not any(SCHEME in each for each in requirements):
            continue
        if is_on:
            operation["responses"] = _RESPONSES | operation.get("responses", {})
        else:
            operation["security"] = [each for each in requirements if SCHEME not in each]
            if not operation["security"]:
                del operation["security"]


def _operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document.get("paths", {}).values():
        yield from (each for each in path.values() if isinstance(each, dict))
