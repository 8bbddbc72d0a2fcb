"""Presigned URLs: how they are signed, for how long, and which URLs are the project's own."""

from urllib.parse import parse_qs, urlsplit

import pytest

from producer.settings import ProducerSettings
from producer.storage import PresignedUrls


def storage(endpoint_url: str = "https://account.r2.example", bucket: str = "pictures") -> PresignedUrls:
    return PresignedUrls(endpoint_url=endpoint_url, bucket=bucket, access_key_id="key-id", secret_access_key="canary")


@pytest.mark.parametrize(
    "endpoint", ["https://account.r2.example", "http://127.0.0.1:9000", "http://localhost:9000", "http://minio:9000"]
)
def test_urls_are_signed_as_r2_wants_it_with_the_bucket_in_the_path(endpoint: str) -> None:
    url = storage(endpoint).lora_url("loras/a b.safetensors", expires_s=60)
    parts, query = urlsplit(url), parse_qs(urlsplit(url).query)
    assert f"{parts.scheme}://{parts.netloc}" == endpoint
    assert parts.path == "/pictures/loras/a%20b.safetensors"
    assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]
    assert query["X-Amz-Credential"][0].endswith("/auto/s3/aws4_request")
    assert (query["X-Amz-Expires"], query["X-Amz-SignedHeaders"]) == (["60"], ["host"])
    assert "canary" not in url


def test_an_upload_signs_no_header_that_an_uploader_would_have_to_send() -> None:
    query = parse_qs(urlsplit(storage().upload_url("x.png")).query)
    assert query["X-Amz-SignedHeaders"] == ["host"]
    assert query["X-Amz-Expires"] == ["3600"]
    assert not [name for name in query if "checksum" in name.lower()]


@pytest.mark.parametrize("expires_s", [0, -1, 604_801])
def test_a_lifetime_beyond_a_week_or_below_a_second_is_refused(expires_s: int) -> None:
    with pytest.raises(ValueError, match="604800"):
        storage().lora_url("a", expires_s)
    with pytest.raises(ValueError, match="604800"):
        storage().upload_url("a", expires_s)
    assert "X-Amz-Expires=604800" in storage().lora_url("a", 604_800)


def test_an_empty_key_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        storage().lora_url("")


@pytest.mark.parametrize("key", ["a", "loras/ä b+c%2F.safetensors", "x/y/../z", "q?a=b#c"])
def test_what_was_signed_is_recognised_with_and_without_its_query(key: str) -> None:
    url = storage().lora_url(key)
    assert storage().owns(url) == key
    assert storage().owns(url.partition("?")[0]) == key


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("https://pictures.account.r2.example/loras/a?x=1", "loras/a"),
        ("https://ACCOUNT.r2.example:443/pictures/a", "a"),
        ("https://account.r2.example/pictures/", None),
        ("https://account.r2.example/pictures", None),
        ("https://account.r2.example/pictures2/a", None),
        ("https://account.r2.example/other/a", None),
        ("http://account.r2.example/pictures/a", None),
        ("https://account.r2.example:8443/pictures/a", None),
        ("https://account.r2.example.evil.example/pictures/a", None),
        ("https://evil.example/pictures/a", None),
        ("https://evil.example/?https://account.r2.example/pictures/a", None),
        ("https://other.account.r2.example/pictures/a", None),
        ("https://[", None),
        ("https://account.r2.example:port/pictures/a", None),
        ("", None),
    ],
)
def test_only_urls_into_the_own_bucket_are_owned(url: str, key: str | None) -> None:
    assert storage().owns(url) == key


def test_storage_needs_all_of_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "R2_ACCESS_KEY_ID": "key-id",
        "R2_SECRET_ACCESS_KEY": "canary",
        "R2_BUCKET_NAME": "pictures",
        "R2_ENDPOINT_URL": "https://account.r2.example/",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert isinstance(PresignedUrls.from_settings(ProducerSettings()), PresignedUrls)
    for name in values:
        with monkeypatch.context() as context:
            context.delenv(name)
            assert PresignedUrls.from_settings(ProducerSettings()) is None
