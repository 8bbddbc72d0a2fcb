"""Reading finished pictures out of the project's own bucket."""

import asyncio
import hashlib
from typing import TYPE_CHECKING, Self

from botocore.exceptions import BotoCoreError, ClientError

from producer.settings import ProducerSettings
from producer.storage import PresignedUrls

if TYPE_CHECKING:
    from types_boto3_s3.client import S3Client

_CONNECTIONS = 50
_CONNECT_S = 5
_READ_S = 20


class PictureUnavailable(Exception):
    """The picture could not be read, or is not the one that was drawn. The text says which, and no URL."""


class Pictures:
    """Blocks nobody: boto3 works in a thread."""

    def __init__(self, client: "S3Client", bucket: str) -> None:
        self._client = client
        self._bucket = bucket

    @classmethod
    def from_settings(cls, settings: ProducerSettings) -> Self | None:
        """None where the storage's settings are not complete: then nothing can be read."""
        storage = PresignedUrls.from_settings(settings)
        if storage is None:
            return None
        client = storage.client(
            max_pool_connections=_CONNECTIONS,
            connect_timeout=_CONNECT_S,
            read_timeout=_READ_S,
            retries={"mode": "standard", "total_max_attempts": 3},
        )
        return cls(client, storage.bucket)

    def close(self) -> None:
        self._client.close()

    async def read(self, key: str, *, sha256: str) -> bytes:
        """The object's bytes, whose digest in hex is `sha256`.

        Raises PictureUnavailable.
        """
        try:
            png = await asyncio.to_thread(self._get, key)
        except (BotoCoreError, ClientError, OSError) as error:
            raise PictureUnavailable(f"the storage does not give the picture: {_reason(error)}") from None
        if hashlib.sha256(png).hexdigest() != sha256.lower():
            raise PictureUnavailable("the storage has another picture in its place")
        return png

    def _get(self, key: str) -> bytes:
        return self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read()


def _reason(error: Exception) -> str:
    if isinstance(error, ClientError):
        return str(error.response.get("Error", {}).get("Code", "ClientError"))
    return type(error).__name__
