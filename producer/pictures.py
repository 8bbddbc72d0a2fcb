"""Reading finished pictures out of the project's own bucket."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

import aiohttp
from yarl import URL

from producer.settings import ProducerSettings
from producer.storage import PresignedUrls

_CONNECTIONS = 50
_WITHIN_S = 10.0
_SIGNED_FOR_S = 60


class PictureUnavailable(Exception):
    """The picture could not be read, or is not the one that was drawn. The text says which, and no URL."""


class Pictures:
    """Blocks nobody, and a read that is cancelled ends: no thread waits for a storage that hangs."""

    def __init__(self, session: aiohttp.ClientSession, storage: PresignedUrls) -> None:
        self._session = session
        self._storage = storage

    @classmethod
    @asynccontextmanager
    async def from_settings(cls, settings: ProducerSettings) -> AsyncIterator[Self | None]:
        """None where the storage's settings are not complete: then nothing can be read. Raises ValueError."""
        storage = PresignedUrls.from_settings(settings)
        if storage is None:
            yield None
            return
        await asyncio.to_thread(storage.lora_url, "any")  # builds boto3's client, which takes its time
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=_CONNECTIONS),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=_WITHIN_S),
        ) as session:
            yield cls(session, storage)

    async def read(self, key: str, *, sha256: str) -> bytes:
        """The object's bytes, whose digest in hex is `sha256`.

        Raises PictureUnavailable.
        """
        try:
            png = await self._get(self._storage.lora_url(key, _SIGNED_FOR_S))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise PictureUnavailable(f"the storage does not give the picture: {type(error).__name__}") from None
        if hashlib.sha256(png).hexdigest() != sha256.lower():
            raise PictureUnavailable("the storage has another picture in its place")
        return png

    async def _get(self, url: str) -> bytes:
        async with self._session.get(URL(url, encoded=True), allow_redirects=False) as response:
            if response.status != 200:
                raise PictureUnavailable(f"the storage does not give the picture: HTTP {response.status}")
            return await response.read()
