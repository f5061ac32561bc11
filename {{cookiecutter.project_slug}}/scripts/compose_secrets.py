"""Create the secrets of compose.yaml in `.secrets`, unless they exist.

Usage: `python -m scripts.compose_secrets`.
"""

import secrets
from pathlib import Path

DIRECTORY = Path(__file__).resolve().parent.parent / ".secrets"


def create_secrets(directory: Path = DIRECTORY) -> None:
    """Write a new password, and the database URL that contains it, unless they exist.

    Only the owner can enter the directory. The files in it are readable by all users, since the
    containers run as other users: they see the files, but not the directory.
    """
    if (directory / "database_url").exists():
        return
    directory.mkdir(mode=0o700, exist_ok=True)
    password = secrets.token_urlsafe(24)
    _write(directory / "postgres_password", password)
    # Last: its presence means that all are written.
    _write(directory / "database_url", f"postgresql://app:{password}@postgres:5432/app")


def _write(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(0o444)


if __name__ == "__main__":
    create_secrets()
