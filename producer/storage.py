"""Presigned URLs for the project's own bucket: any S3-compatible store. Signing needs no network."""

from functools import cached_property
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import SplitResult, unquote, urlsplit

import boto3
from botocore.config import Config

from producer.settings import ProducerSettings

if TYPE_CHECKING:
    from types_boto3_s3.client import S3Client

MAX_EXPIRES_S = 604_800
_DEFAULT_PORTS = {"http": 80, "https": 443}


class PresignedUrls:
    """Signs for one bucket. Whoever has such a URL may use it until it expires: keep its query out of logs."""

    def __init__(self, *, endpoint_url: str, bucket: str, access_key_id: str, secret_access_key: str) -> None:
        self._endpoint_url = endpoint_url
        self.bucket = bucket
        self._access_key_id = access_key_id
        self._secret_access_key = secret_access_key

    @classmethod
    def from_settings(cls, settings: ProducerSettings) -> Self | None:
        """None where the storage's settings are not complete: then nothing can be signed."""
        key_id, secret = settings.r2_access_key_id, settings.r2_secret_access_key
        if settings.r2_endpoint_url is None or settings.r2_bucket is None or key_id is None or secret is None:
            return None
        return cls(
            endpoint_url=settings.r2_endpoint_url,
            bucket=settings.r2_bucket,
            access_key_id=key_id.get_secret_value(),
            secret_access_key=secret.get_secret_value(),
        )

    def lora_url(self, key: str, expires_s: int = 3600) -> str:
        """A URL that reads the object `key` (GET, not HEAD) for `expires_s` seconds, at most a week.

        Raises ValueError.
        """
        return self._sign("get_object", key, expires_s)

    def upload_url(self, key: str, expires_s: int = 3600) -> str:
        """A URL that writes the object `key` (PUT) for `expires_s` seconds, at most a week.

        Raises ValueError.
        """
        return self._sign("put_object", key, expires_s)

    def owns(self, url: str) -> str | None:
        """The key of the object that `url` names in this bucket, signed or not; None for any other URL."""
        try:
            parts = urlsplit(url)
            origin, own_origin = _origin(parts), _origin(urlsplit(self._endpoint_url))
        except ValueError:
            return None
        path = parts.path.removeprefix("/")
        if origin == own_origin:
            bucket, _, path = path.partition("/")
            if bucket != self.bucket:
                return None
        elif origin != (own_origin[0], f"{self.bucket}.{own_origin[1]}", own_origin[2]):
            return None
        return unquote(path) or None

    def _sign(self, operation: str, key: str, expires_s: int) -> str:
        if not 1 <= expires_s <= MAX_EXPIRES_S:
            raise ValueError(f"a presigned URL lives 1 to {MAX_EXPIRES_S} seconds, not {expires_s}")
        if not key:
            raise ValueError("an object key is not empty")
        return self._s3.generate_presigned_url(
            operation, Params={"Bucket": self.bucket, "Key": key}, ExpiresIn=expires_s
        )

    @cached_property
    def _s3(self) -> "S3Client":
        return self.client()

    def client(self, **options: Any) -> "S3Client":
        """boto3's client for the same store; close it. `options`: more of botocore's `Config`, as deadlines."""
        config = Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},  # what every endpoint knows: R2, an IP, a name without wildcard DNS
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            **options,
        )
        client: S3Client = boto3.Session().client(  # the default session is not for several threads
            "s3",
            endpoint_url=self._endpoint_url,
            region_name="auto",
            aws_access_key_id=self._access_key_id,
            aws_secret_access_key=self._secret_access_key,
            config=config,
        )
        return client


def _origin(parts: SplitResult) -> tuple[str, str, int | None]:
    scheme = parts.scheme.lower()
    return scheme, parts.hostname or "", parts.port or _DEFAULT_PORTS.get(scheme)
