"""LoRA files on disk, shared by every consumer process that is given the same folder.

    objects/<object>-<sha256>-<etag>.safetensors    what a store holds: immutable, published and evicted as a whole
    leases/<random>.safetensors                     one job's own name for its file, often a hard link to an object

One file name says everything about an object, so there is nothing to tear and nothing to lock: publishing is `link`,
evicting is `unlink`, and a job's lease keeps the bytes readable whatever the other processes do meanwhile.
"""

import asyncio
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from uuid import uuid4

import structlog
from yarl import URL

SUFFIX = ".safetensors"
STALE_LEASE_S = 3600.0  # no job runs for so long: its process was killed

# A quoted string of printable characters, which may be weak (RFC 9110, 8.8.3); longer ones make too long a file name.
_ETAG = re.compile(r'(W/)?"[!#-~]{0,60}"')
_NAME = re.compile(r"(?P<object>[0-9a-f]{32})-(?P<sha256>[0-9a-f]{64})-(?P<etag>[0-9a-f]+)\.safetensors")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class CachedLora:
    """An object as a store named it when it was fetched. `object_id` stands for host, port and path."""

    object_id: str
    etag: str
    sha256: str

    @classmethod
    def from_name(cls, name: str) -> Self | None:
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        try:
            return cls(match["object"], bytes.fromhex(match["etag"]).decode("ascii"), match["sha256"])
        except ValueError:
            return None

    @property
    def name(self) -> str:
        return f"{self.object_id}-{self.sha256}-{self.etag.encode('ascii').hex()}{SUFFIX}"


def object_id(url: str) -> str:
    """What a file is cached under: the object, whoever signed the URL and whenever."""
    parts = URL(url, encoded=True)
    place = f"{(parts.host or '').lower()}:{parts.port}{parts.raw_path}"
    return hashlib.sha256(place.encode()).hexdigest()[:32]


def is_cacheable(etag: str | None) -> bool:
    """Whether a later request can ask for news of what `etag` names."""
    return etag is not None and _ETAG.fullmatch(etag) is not None


class LoraCache:
    """The cache in `folder`, which holds at most `max_bytes` of objects once an eviction is through."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._objects = folder / "objects"
        self._leases = folder / "leases"
        self._max_bytes = max_bytes

    @contextmanager
    def lease(self) -> Iterator[Path]:
        """A path in the cache's file system that is one job's own. Nothing is there yet; afterwards it is removed."""
        for folder in (self._objects, self._leases):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._leases / f"{uuid4().hex}{SUFFIX}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    async def take(self, object_id: str, path: Path) -> CachedLora | None:
        """Links the newest cached file of the object to `path`, if there is one and its bytes are still right."""
        for cached in self._versions(object_id):
            _touch(self._objects / cached.name)  # before the link, which would look like a stale lease otherwise
            if not self._link(cached, path):
                continue
            if await asyncio.to_thread(_sha256_of, path) == cached.sha256:
                return cached
            log.warning("lora_cache_corrupt", object=cached.name)
            self._drop(cached, path)
        return None

    async def publish(self, cached: CachedLora, path: Path) -> None:
        """Offers the file at `path` to every later job, in place of the object's older versions; makes room for it."""
        try:
            (self._objects / cached.name).hardlink_to(path)
        except FileExistsError:  # another process was faster
            _touch(self._objects / cached.name)
        except OSError as error:
            log.warning("lora_cache_unwritable", reason=error.strerror)
        for old in self._versions(cached.object_id):
            if old != cached:
                (self._objects / old.name).unlink(missing_ok=True)
        await self.evict()

    async def evict(self, *, everything: bool = False) -> None:
        """Removes the least recently used objects until the rest fit, and leases that killed processes left behind."""
        await asyncio.to_thread(self._evict, 0 if everything else self._max_bytes)

    def _evict(self, max_bytes: int) -> None:
        files = sorted(_stats(self._objects), key=lambda file: file[1], reverse=True)
        total = 0
        for path, _, size in files:
            total += size
            if total > max_bytes:
                path.unlink(missing_ok=True)
        for path, changed_s, _ in _stats(self._leases):
            if time.time() - changed_s > STALE_LEASE_S:
                path.unlink(missing_ok=True)

    def _link(self, cached: CachedLora, path: Path) -> bool:
        try:
            path.hardlink_to(self._objects / cached.name)
        except OSError:  # evicted meanwhile, or a file system without links
            return False
        return True

    def _drop(self, cached: CachedLora, path: Path) -> None:
        path.unlink()
        (self._objects / cached.name).unlink(missing_ok=True)

    def _versions(self, object_id: str) -> list[CachedLora]:
        """The object's cached versions, newest first."""
        files = sorted(_stats(self._objects, f"{object_id}-*"), key=lambda file: file[1], reverse=True)
        versions = (CachedLora.from_name(path.name) for path, _, _ in files)
        return [version for version in versions if version is not None]


def _stats(folder: Path, pattern: str = "*") -> list[tuple[Path, float, int]]:
    """Path, time of the last use in seconds, and size in bytes of each file in `folder`."""
    found = []
    for path in folder.glob(pattern):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        found.append((path, status.st_mtime, status.st_size))
    return found


def _touch(path: Path) -> None:
    # unlike Path.touch, utime never creates a file that was evicted meanwhile
    with suppress(OSError):
        os.utime(path)


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
