"""A real PostgreSQL as a child process, from PATH or from the pgserver wheel, reached by a socket in its own folder."""

import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import psutil
from sqlalchemy import create_engine

from demo.servers import STOP_TIMEOUT_S, ServerFailed, wait_until_ready

_READY = re.compile(rb"database system is ready to accept connections")
QUICK = {"fsync": "off", "full_page_writes": "off", "shared_buffers": "32MB"}
_UNPRIVILEGED = "nobody"  # PostgreSQL refuses to run as root


class PostgresServer:
    """Its data stay while it is stopped and started; the URLs of its databases too."""

    def __init__(self, folder: Path, binaries: Path, settings: Mapping[str, str]) -> None:
        self._folder = folder
        self._binaries = binaries
        self._settings = settings
        self._log = folder / "postgres.log"
        self._process: subprocess.Popen[bytes] | None = None

    def initialise(self) -> None:
        """Makes an empty cluster. Raises ServerFailed."""
        options = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        if self._run("initdb", options).wait():
            raise ServerFailed(f"initdb failed:\n{self._log.read_text(errors='replace')}")

    def start(self) -> None:
        """Raises ServerFailed."""
        settings = [f"-c{name}={value}" for name, value in self._settings.items()]
        self._process = self._run("postgres", ["-h", "", "-k", str(self._folder), *settings])
        wait_until_ready(self._process, self._log, _READY)

    def stop(self) -> None:
        """Ends it, and with it every connection."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def kill(self) -> None:
        """kill -9 of all its processes: what was committed is there at the next start."""
        assert self._process is not None
        master = psutil.Process(self._process.pid)
        for process in [master, *master.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://postgres@/{database}?host={self._folder}"

    def create_database(self) -> str:
        """The URL of a new, empty database."""
        name = _new_name()
        _execute(self.url("postgres"), f"CREATE DATABASE {name}")
        return self.url(name)

    def _run(self, program: str, options: Sequence[str]) -> subprocess.Popen[bytes]:
        user = pwd.getpwnam(_UNPRIVILEGED) if os.geteuid() == 0 else None
        with self._log.open("wb") as output:
            # in a group of its own, as the other servers are, and in a folder that this user may be in
            return subprocess.Popen(
                [str(self._binaries / program), "-D", str(self._folder / "data"), *options],
                user=user and user.pw_uid,
                group=user and user.pw_gid,
                extra_groups=user and [],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
            )


@contextmanager
def postgres_server(settings: Mapping[str, str] = QUICK) -> Iterator[PostgresServer]:
    """An empty PostgreSQL that forgets everything at the end; with QUICK, also in a crash of the machine.

    Raises ServerFailed.
    """
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if os.geteuid() == 0:
            shutil.chown(folder, _UNPRIVILEGED)
        server = PostgresServer(folder, _binaries(folder), settings)
        try:
            server.initialise()
            server.start()
            yield server
        finally:
            server.stop()


def create_schema(database_url: str) -> str:
    """The URL of a new, empty schema in a database: quicker than a database, and as good for one test."""
    name = _new_name()
    _execute(database_url, f"CREATE SCHEMA {name}")
    return f"{database_url}&options=-csearch_path%3D{name}"


def _new_name() -> str:
    return f"t{uuid.uuid4().hex[:12]}"


def _execute(database_url: str, statement: str) -> None:
    engine = create_engine(database_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(statement)
    engine.dispose()


def _binaries(folder: Path) -> Path:
    found = shutil.which("postgres")
    if found is not None and shutil.which("initdb"):
        return Path(found).parent
    try:
        site = Path(str(metadata.distribution("pgserver").locate_file("")))
    except metadata.PackageNotFoundError:
        raise ServerFailed("no postgres: neither on PATH nor in the pgserver package") from None
    if os.geteuid() == 0:  # root's own folders may be closed to the user that it runs as
        for part in ("pgserver", "pgserver.libs"):
            shutil.copytree(site / part, folder / part)
        site = folder
    return site / "pgserver/pginstall/bin"
