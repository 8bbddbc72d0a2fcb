"""The project's own bucket, in any S3-compatible store."""

from typing import TYPE_CHECKING

import boto3
from botocore.config import Config
from pydantic import SecretStr

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

PRESIGNED_GET_S = 1800  # a clock that is slow by the 15 minutes that S3 forgives makes them half as good

# R2 takes SigV4 only; the checksum headers that boto3 adds by default are refused by some stores.
_CLIENT_CONFIG = Config(
    signature_version="s3v4",
    connect_timeout=5,
    read_timeout=20,
    retries={"total_max_attempts": 2, "mode": "standard"},
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
    s3={"addressing_style": "path"},
)


class BucketNotConfigured(Exception):
    """The text names the variables that are missing."""


class OwnBucket:
    """The bucket and the credentials for it. Making one connects to nothing."""

    def __init__(
        self,
        *,
        endpoint_url: str | None,
        name: str | None,
        access_key_id: SecretStr | None,
        secret_access_key: SecretStr | None,
    ) -> None:
        settings = {
            "R2_ENDPOINT_URL": endpoint_url,
            "R2_BUCKET_NAME": name,
            "R2_ACCESS_KEY_ID": access_key_id,
            "R2_SECRET_ACCESS_KEY": secret_access_key,
        }
        self.missing = tuple(variable for variable, value in settings.items() if not value)
        self.name = name or ""
        self._client: S3Client | None = None
        if endpoint_url and access_key_id and secret_access_key:
            self._client = boto3.client(
                "s3",
                endpoint_url=endpoint_url,
                region_name="auto",
                aws_access_key_id=access_key_id.get_secret_value(),
                aws_secret_access_key=secret_access_key.get_secret_value(),
                config=_CLIENT_CONFIG,
            )

    @property
    def client(self) -> "S3Client":
        """Raises BucketNotConfigured."""
        if self._client is None or self.missing:
            raise BucketNotConfigured(f"the storage is not configured: {', '.join(self.missing)} missing")
        return self._client

    def presign_get(self, key: str) -> str:
        """A URL that reads the object `key` for `PRESIGNED_GET_S` seconds.

        Raises BucketNotConfigured.
        """
        return self.client.generate_presigned_url(
            "get_object", Params={"Bucket": self.name, "Key": key}, ExpiresIn=PRESIGNED_GET_S
        )

    def close(self) -> None:
        """Closes the pooled connections."""
        if self._client is not None:
            self._client.close()
