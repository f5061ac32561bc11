"""The service without the code of tracing in its middleware.

Against it, the service shows what this code costs while traces are off.
"""

import ast
import inspect
from typing import Any

from app.web import middleware
from stored import app as app

#: The methods that start and end the span of a request.
TRACED_METHODS = ("serve", "_finish")
#: The conditions under which they do.
CONDITIONS = ("tracing.current is not None", "self.span is not None")


class RemoveTracing(ast.NodeTransformer):
    """Removes the `if` statements that begin with a condition of tracing."""

    removed = 0

    def visit_If(self, node: ast.If) -> ast.AST | None:
        """Remove the statement, or look into it."""
        if not ast.unparse(node.test).startswith(CONDITIONS):
            return self.generic_visit(node)
        self.removed += 1
        return None


def remove_tracing() -> None:
    """Replace the methods. Exits if they are not as expected."""
    (exchange,) = (
        node
        for node in ast.parse(inspect.getsource(middleware)).body
        if isinstance(node, ast.ClassDef) and node.name == "Exchange"
    )
    remover = RemoveTracing()
    exchange.body = [
        remover.visit(node) for node in exchange.body if getattr(node, "name", "") in TRACED_METHODS
    ]
    if remover.removed != len(TRACED_METHODS):
        raise SystemExit(f"{middleware.__file__}: {remover.removed} statements start or end a span")
    names: dict[str, Any] = dict(vars(middleware))
    exec(compile(ast.Module([exchange], []), middleware.__file__, "exec"), names)
    for name in TRACED_METHODS:
        setattr(middleware.Exchange, name, getattr(names["Exchange"], name))


remove_tracing()
