"""A program with a secret, for lab 6: it crashes with a report, and it starts another program.

Usage: `python -m labs.leaky crash` or `python -m labs.leaky child`. It reads the settings as the
service does.
"""

import json
import os
import subprocess
import sys

from app.settings import load_settings


def crash() -> None:
    """Fail, and print the report that many crash reporters send: the stack and the environment."""
    try:
        msg = "something unexpected"
        raise ValueError(msg)
    except ValueError as error:
        sys.stdout.write(json.dumps({"error": str(error), "environment": dict(os.environ)}))


def start_a_child() -> None:
    """Start a program that prints the environment it gets. Any tool gets the same."""
    program = "import os; print(dict(os.environ))"
    subprocess.run([sys.executable, "-c", program], check=True)


if __name__ == "__main__":
    # It has the secret, from wherever it is.
    if not load_settings().database_url.get_secret_value():
        sys.exit("no DATABASE_URL")
    {"crash": crash, "child": start_a_child}[sys.argv[1]]()
