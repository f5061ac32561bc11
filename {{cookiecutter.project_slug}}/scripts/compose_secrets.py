"""Create the secrets of compose.yaml in `.secrets`, unless they exist.

Usage: `python -m scripts.compose_secrets`.
"""

import secrets
from pathlib import Path

DIRECTORY = Path(__file__).resolve().parent.parent / ".secrets"


def create_secrets(directory: Path = DIRECTORY) -> None:
    """Write new passwords, and the URLs that contain them, unless they exist.

    Only the owner can enter the directory. The files in it are readable by all users, since the
    containers run as other users: they see the files, but not the directory.
    """
    directory.mkdir(mode=0o700, exist_ok=True)
    _create_postgres_secrets(directory)
    _create_rabbitmq_secrets(directory)  # jobs


def _create_postgres_secrets(directory: Path) -> None:
    if (directory / "database_url").exists():
        return
    password = secrets.token_urlsafe(24)
    _write(directory / "postgres_password", password)
    # Last: its presence means that all are written.
    _write(directory / "database_url", f"postgresql://app:{password}@postgres:5432/app")


# jobs: begin
def _create_rabbitmq_secrets(directory: Path) -> None:
    if (directory / "amqp_url").exists():
        return
    password = secrets.token_urlsafe(24)
    # The image of RabbitMQ reads no password from a file, but its server reads configuration.
    _write(directory / "rabbitmq.conf", f"default_user = app\ndefault_pass = {password}\n")
    _write(directory / "amqp_url", f"amqp://app:{password}@rabbitmq:5672/")


# jobs: end
def _write(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(0o444)


if __name__ == "__main__":
    create_secrets()
