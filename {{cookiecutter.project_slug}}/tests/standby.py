"""A streaming standby of a test's Postgres server."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scripts.dev_services import POSTGRES_SETTINGS, TEMPORARY_SETTINGS, Postgres, free_port


class Standby(Postgres):
    """A standby with its data in a directory, and with the programs of its primary."""

    def __init__(self, primary: Postgres, directory: Path) -> None:
        """Copy the primary, which runs, with pg_basebackup."""
        self.directory = directory
        self.directory.chmod(0o755)
        self.settings = POSTGRES_SETTINGS | TEMPORARY_SETTINGS
        self.user = primary.user
        self.programs = primary.programs
        self.data = directory / "data"
        self.password_file = primary.password_file
        self.data.mkdir(mode=0o700)
        if self.user:
            shutil.chown(self.data, self.user)
        follow_primary = ["--write-recovery-conf", f"--dbname={primary.url}"]
        self._run("pg_basebackup", *follow_primary, "--checkpoint=fast", "--no-sync")
        self.use_port(free_port())

    def promote(self) -> None:
        """Make it a primary, and wait until it is."""
        self._run("pg_ctl", "promote", "--wait")


def demote(server: Postgres, primary: Postgres) -> None:
    """Start a primary, which was stopped before the other was promoted, as its standby."""
    with (server.data / "postgresql.auto.conf").open("a") as file:
        file.write(f"primary_conninfo = '{primary.url}'\n")
    (server.data / "standby.signal").touch()
    server.start()


@contextlib.contextmanager
def standby(primary: Postgres) -> Iterator[Standby]:
    """Run a standby for the duration of the block, then delete it with its data."""
    with tempfile.TemporaryDirectory(prefix="standby-", ignore_cleanup_errors=True) as directory:
        server = Standby(primary, Path(directory))
        try:
            server.start()
            yield server
        finally:
            if server.is_running:
                server.stop()
