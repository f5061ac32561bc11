"""Makes the secrets of compose.yaml, once: `python -m scripts.compose_secrets` writes what is missing in .secrets."""

import secrets
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / ".secrets"


def make(folder: Path = FOLDER) -> None:
    """Write a new password and the URL that holds it, unless they are there.

    The folder is for its owner alone. The files in it can be read by everybody, since the containers' users are others:
    they see the files and not the folder.
    """
    if (folder / "database_url").exists():
        return
    folder.mkdir(mode=0o700, exist_ok=True)
    password = secrets.token_urlsafe(24)
    for name, text in (
        ("postgres_password", password),
        ("database_url", f"postgresql://app:{password}@postgres:5432/app"),
    ):
        path = folder / name
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(0o444)


if __name__ == "__main__":
    make()
