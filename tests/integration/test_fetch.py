"""LoRA files over real HTTP on loopback, through the allow-list and the cache, to a path on disk."""

import asyncio
import errno
import hashlib
import os
import socket
import traceback
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from pydantic import SecretStr

from consumer.bucket import OwnBucket
from consumer.errors import LoraFetchInterrupted, LoraRefused, LoraUrlExpired, WorkerError
from consumer.lora import cache as cache_module
from consumer.lora import fetch as fetch_module
from consumer.lora.cache import STALE_LEASE_S, CachedLora, LoraCache, object_id
from consumer.lora.fetch import LoraFetcher, OwnBucketReader
from schemas.net.http import DEFAULT_DEADLINES, Deadlines, open_session, retry_after_s
from schemas.net.urls import HostRules
from schemas.requests import LoraRef
from tests.s3_stub import (
    ACCESS_KEY,
    SECRET_KEY,
    Reply,
    S3Stub,
    content,
    endless,
    reset,
    silence,
    slow,
    status,
    truncated,
)

PATH = "/loras/style.safetensors"
BODY = b"weights " * 40_000
SHA256 = hashlib.sha256(BODY).hexdigest()
NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
PLENTY = 1 << 30


class Bench:
    """A stub, a cache folder, and fetchers over them."""

    def __init__(self, stub: S3Stub, folder: Path) -> None:
        self.stub = stub
        self.folder = folder
        self.session = open_session(allow_loopback=True)

    def fetcher(
        self,
        *,
        max_bytes: int = PLENTY,
        cache_bytes: int = PLENTY,
        deadlines: Deadlines = DEFAULT_DEADLINES,
        own_bucket: OwnBucketReader | None = None,
    ) -> LoraFetcher:
        return LoraFetcher(
            self.session,
            LoraCache(self.folder, cache_bytes),
            rules=HostRules.own(self.stub.url, "loras", allow_loopback=True),
            own_bucket=own_bucket,
            max_bytes=max_bytes,
            deadlines=deadlines,
        )

    def ref(self, path: str = PATH, *, sha256: str | None = None) -> LoraRef:
        return LoraRef(url=self.stub.presign("GET", path), sha256=sha256)

    async def fetch(self, fetcher: LoraFetcher | None = None, ref: LoraRef | None = None) -> bytes:
        async with (fetcher or self.fetcher()).fetch(ref or self.ref()) as path:
            return path.read_bytes()

    async def failure(self, ref: LoraRef | None = None, fetcher: LoraFetcher | None = None) -> WorkerError:
        with pytest.raises(WorkerError) as caught:
            await self.fetch(fetcher, ref)
        shown = "".join(traceback.format_exception(caught.value)) + str(caught.value.details)
        assert "X-Amz" not in shown
        assert self.leases() == []
        return caught.value

    def objects(self) -> list[Path]:
        return sorted((self.folder / "objects").glob("*"))

    def leases(self) -> list[Path]:
        return sorted((self.folder / "leases").glob("*"))


@pytest.fixture
async def bench(stub: S3Stub, tmp_path: Path) -> AsyncIterator[Bench]:
    stub.put(PATH, BODY)
    bench = Bench(stub, tmp_path / "cache")
    yield bench
    await bench.session.close()


async def test_a_fetched_file_is_the_objects_and_the_lease_ends_with_its_block(bench: Bench) -> None:
    async with bench.fetcher().fetch(bench.ref()) as path:
        assert path.read_bytes() == BODY
        assert path.suffix == ".safetensors"
    assert not path.exists()
    assert bench.leases() == []


async def test_a_fresh_url_of_a_known_object_is_asked_for_news_and_its_304_is_a_hit(bench: Bench) -> None:
    first = bench.ref()
    later = LoraRef(url=bench.stub.presign("GET", PATH, expires_s=301))
    assert first.url != later.url
    await bench.fetch(ref=first)
    assert await bench.fetch(ref=later) == BODY
    asked = [seen.headers.get("If-None-Match") for seen in bench.stub.seen]
    assert asked == [None, bench.stub.objects[PATH].etag]
    assert {seen.method for seen in bench.stub.seen} == {"GET"}


async def test_a_hit_is_authorised_anew(bench: Bench) -> None:
    await bench.fetch()
    tampered = LoraRef(url=(bench.ref().url or "")[:-4] + "0000")
    assert isinstance(await bench.failure(tampered), LoraUrlExpired)


async def test_a_changed_object_replaces_its_older_version(bench: Bench) -> None:
    await bench.fetch()
    bench.stub.put(PATH, b"second version")
    assert await bench.fetch() == b"second version"
    assert len(bench.objects()) == 1
    assert await bench.fetch() == b"second version"


async def test_the_cache_keeps_objects_apart_by_host_and_path_and_not_by_query() -> None:
    ids = {object_id(f"https://{host}{path}?{query}") for host in "ab" for path in ("/x", "/y") for query in "12"}
    assert len(ids) == 4
    assert object_id("https://A:443/x") == object_id("https://a/x")


@pytest.mark.parametrize("headers", [{}, {"ETag": "unquoted"}, {"ETag": f'"{"long" * 20}"'}])
async def test_what_cannot_be_asked_after_is_not_cached(bench: Bench, headers: dict[str, str]) -> None:
    bench.stub.answer(PATH, content(BODY, **headers))
    assert await bench.fetch() == await bench.fetch() == BODY
    assert bench.objects() == []
    assert all("If-None-Match" not in seen.headers for seen in bench.stub.seen)


async def test_a_weak_etag_is_sent_back_as_it_came(bench: Bench) -> None:
    bench.stub.answer(PATH, content(BODY, ETag='W/"v1"'), status(304))
    assert await bench.fetch() == await bench.fetch() == BODY
    assert bench.stub.seen[1].headers["If-None-Match"] == 'W/"v1"'


async def test_a_corrupt_cache_entry_is_dropped_and_fetched_again(bench: Bench) -> None:
    await bench.fetch()
    (entry,) = bench.objects()
    entry.write_bytes(BODY[:-1] + b"!")
    assert await bench.fetch() == BODY
    assert "If-None-Match" not in bench.stub.seen[1].headers
    assert [path.read_bytes() for path in bench.objects()] == [BODY]


async def test_foreign_files_in_the_cache_folder_are_passed_over(bench: Bench) -> None:
    await bench.fetch()
    (entry,) = bench.objects()
    name = entry.name.split("-")
    for odd in (f"{name[0]}-{name[1]}-ff.safetensors", f"{name[0]}-{name[1]}-abc.safetensors", f"{name[0]}-x"):
        (entry.parent / odd).write_bytes(b"")
    assert await bench.fetch() == BODY
    assert "If-None-Match" in bench.stub.seen[1].headers


async def test_an_object_stays_readable_while_it_is_replaced_and_evicted(bench: Bench) -> None:
    await bench.fetch()
    async with bench.fetcher().fetch(bench.ref()) as held:
        bench.stub.put(PATH, b"second version")
        await bench.fetch()
        await LoraCache(bench.folder, 0).evict()
        assert bench.objects() == []
        assert held.read_bytes() == BODY


async def test_the_least_recently_used_objects_are_evicted_first(bench: Bench) -> None:
    paths = [f"/loras/{name}.safetensors" for name in "abc"]
    fetcher = bench.fetcher(cache_bytes=250)
    for path in paths[:2]:
        bench.stub.put(path, path.encode() * 5)  # 100 bytes and some
        await bench.fetch(fetcher, bench.ref(path))
    for age_s, path in enumerate(paths[:2]):  # a is older than b
        (entry,) = (bench.folder / "objects").glob(f"{object_id(bench.stub.url + path)}-*")
        os.utime(entry, (1000 + age_s, 1000 + age_s))
    await bench.fetch(fetcher, bench.ref(paths[0]))  # a hit makes it young
    bench.stub.put(paths[2], paths[2].encode() * 5)
    await bench.fetch(fetcher, bench.ref(paths[2]))
    kept = {entry.name[:32] for entry in bench.objects()}
    assert kept == {object_id(bench.stub.url + path) for path in (paths[0], paths[2])}


async def test_a_file_larger_than_the_whole_cache_serves_its_job(bench: Bench) -> None:
    assert await bench.fetch(bench.fetcher(cache_bytes=10)) == BODY
    assert bench.objects() == []


async def test_leases_of_killed_processes_are_swept_and_live_ones_are_not(bench: Bench) -> None:
    cache = LoraCache(bench.folder, PLENTY)
    with cache.lease() as live:
        live.write_bytes(b"live")
        left_behind = live.with_name("left-behind.safetensors")
        left_behind.write_bytes(b"old")
        long_ago = datetime.now(UTC).timestamp() - STALE_LEASE_S - 1
        os.utime(left_behind, (long_ago, long_ago))
        await cache.evict()
        assert bench.leases() == [live]


async def test_a_hit_on_a_file_of_long_ago_is_not_swept_away_while_it_is_checked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = LoraCache(bench.folder, PLENTY)
    name = object_id(bench.stub.url + PATH)
    with cache.lease() as path:
        path.write_bytes(BODY)
        await cache.publish(CachedLora(name, '"e"', SHA256), path)
    long_ago = datetime.now(UTC).timestamp() - STALE_LEASE_S - 1
    os.utime(bench.objects()[0], (long_ago, long_ago))
    digest = cache_module._sha256_of

    def evicted_meanwhile(path: Path) -> str:
        cache._evict(PLENTY)
        return digest(path)

    monkeypatch.setattr(cache_module, "_sha256_of", evicted_meanwhile)
    with cache.lease() as path:
        assert await cache.take(name, path) is not None
        assert path.read_bytes() == BODY


async def test_processes_that_publish_the_same_object_agree(bench: Bench) -> None:
    fetchers = [bench.fetcher() for _ in range(4)]
    assert await asyncio.gather(*(bench.fetch(fetcher) for fetcher in fetchers)) == [BODY] * 4
    assert len(bench.objects()) == 1


async def test_an_evicted_entry_is_not_brought_back_empty_by_a_hit(bench: Bench) -> None:
    cache = LoraCache(bench.folder, PLENTY)
    with cache.lease() as path:
        path.write_bytes(BODY)
        await cache.publish(CachedLora(object_id(bench.stub.url + PATH), '"e"', SHA256), path)
    with cache.lease() as path:
        taking = asyncio.create_task(cache.take(object_id(bench.stub.url + PATH), path))
        await asyncio.sleep(0)
        bench.objects()[0].unlink()
        assert await taking is not None
        assert path.read_bytes() == BODY
    assert bench.objects() == []


async def test_a_cache_that_cannot_link_still_serves_its_jobs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "links are not supported here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert await bench.fetch() == await bench.fetch() == BODY


async def test_a_right_digest_is_accepted_in_any_case(bench: Bench) -> None:
    for sha256 in (SHA256, SHA256.upper()):
        assert await bench.fetch(ref=bench.ref(sha256=sha256)) == BODY


async def test_a_wrong_digest_is_refused_and_never_cached(bench: Bench) -> None:
    error = await bench.failure(bench.ref(sha256="0" * 64))
    assert isinstance(error, LoraRefused)
    assert error.details["sha256"] == SHA256
    assert bench.objects() == []


async def test_a_wrong_digest_is_refused_on_a_hit_too(bench: Bench) -> None:
    await bench.fetch()
    assert isinstance(await bench.failure(bench.ref(sha256="0" * 64)), LoraRefused)
    assert await bench.fetch() == BODY


@pytest.mark.parametrize("code", [401, 403])
async def test_an_expired_or_wrong_signature_asks_for_a_fresh_url(bench: Bench, code: int) -> None:
    bench.stub.answer(PATH, status(code))
    error = await bench.failure()
    assert isinstance(error, LoraUrlExpired)
    assert error.retry_after_s == 0
    assert error.details == {"status": code, "url": bench.stub.url + PATH}


async def test_urls_that_the_store_itself_refuses_ask_for_a_fresh_one(bench: Bench) -> None:
    yesterday = datetime.now(UTC) - timedelta(days=1)
    for url in (
        bench.stub.presign("GET", PATH, at=yesterday),
        bench.stub.presign("PUT", PATH),
        bench.stub.url + PATH,
    ):
        assert isinstance(await bench.failure(LoraRef(url=url)), LoraUrlExpired)


@pytest.mark.parametrize("code", [300, 301, 302, 307, 308, 400, 404, 405, 410, 416])
async def test_a_redirect_or_another_4xx_is_refused_for_good(bench: Bench, code: int) -> None:
    bench.stub.answer(PATH, status(code, Location=bench.stub.url + PATH))
    error = await bench.failure()
    assert isinstance(error, LoraRefused)
    assert error.retry_after_s is None
    assert len(bench.stub.seen) == 1


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
async def test_a_busy_or_broken_store_is_tried_again_when_it_says(bench: Bench, code: int) -> None:
    bench.stub.answer(PATH, status(code, Retry_After="7"))
    error = await bench.failure()
    assert isinstance(error, LoraFetchInterrupted)
    assert (error.retry_after_s, error.delay_s) == (60, 7)


@pytest.mark.parametrize("code", [204, 206, 304])
async def test_a_success_without_a_file_is_tried_again(bench: Bench, code: int) -> None:
    bench.stub.answer(PATH, status(code))
    assert isinstance(await bench.failure(), LoraFetchInterrupted)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("0", 0),
        ("120", 120),
        ("9" * 5000, 86_400),
        ("Fri, 01 May 2026 12:00:30 GMT", 30),
        ("Fri, 01 May 2026 11:00:00 GMT", 0),
        ("Fri, 01 May 2026 12:00:30 -0000", 30),
        ("-5", None),
        ("soon", None),
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", None),
        ("", None),
        ("٣", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(header: str | None, seconds: float | None) -> None:
    assert retry_after_s(header, NOW) == seconds


@pytest.mark.parametrize("reply", [truncated(BODY, 100_000), reset()], ids=["truncated", "reset"])
async def test_a_body_that_breaks_off_is_tried_again_and_never_cached(bench: Bench, reply: Reply) -> None:
    bench.stub.answer(PATH, reply)
    assert isinstance(await bench.failure(), LoraFetchInterrupted)
    assert bench.objects() == []


@pytest.mark.parametrize(
    "raw", [b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nzz\r\n"]
)
async def test_an_answer_that_is_not_http_is_tried_again(bench: Bench, raw: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}{PATH}?X-Amz-Signature=s3cr3t"
        assert isinstance(await bench.failure(LoraRef(url=url)), LoraFetchInterrupted)


async def test_a_store_that_is_down_is_tried_again(bench: Bench) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}{PATH}?X-Amz-Signature=s3cr3t"
        error = await bench.failure(LoraRef(url=url))
    assert isinstance(error, LoraFetchInterrupted)
    assert "no connection" in str(error)


@pytest.mark.parametrize("reply", [slow(0.02), silence()], ids=["a byte at a time", "silence"])
async def test_a_slow_store_ends_at_a_deadline(bench: Bench, reply: Reply) -> None:
    bench.stub.answer(PATH, reply)
    error = await bench.failure(fetcher=bench.fetcher(deadlines=Deadlines(read_s=5, whole_s=0.3)))
    assert isinstance(error, LoraFetchInterrupted)
    assert "deadline" in str(error)


async def test_a_declared_length_over_the_limit_is_refused_unread(bench: Bench) -> None:
    bench.stub.answer(PATH, truncated(BODY, 0))
    error = await bench.failure(fetcher=bench.fetcher(max_bytes=len(BODY) - 1))
    assert isinstance(error, LoraRefused)
    assert error.details["bytes"] == len(BODY)


async def test_a_file_of_just_the_limit_is_taken(bench: Bench) -> None:
    assert await bench.fetch(bench.fetcher(max_bytes=len(BODY))) == BODY
    bench.stub.put(PATH, BODY + b"!")
    assert isinstance(await bench.failure(fetcher=bench.fetcher(max_bytes=len(BODY))), LoraRefused)


async def test_an_endless_body_ends_at_the_limit(bench: Bench) -> None:
    bench.stub.answer(PATH, endless())
    assert isinstance(await bench.failure(fetcher=bench.fetcher(max_bytes=3 << 20)), LoraRefused)


async def test_a_compressed_body_is_kept_as_it_is_and_none_is_asked_for(bench: Bench) -> None:
    bench.stub.answer(PATH, content(b"\x1f\x8b not gzip at all", Content_Encoding="gzip"))
    assert await bench.fetch() == b"\x1f\x8b not gzip at all"
    assert bench.stub.seen[0].headers["Accept-Encoding"] == "identity"


async def test_a_signed_query_is_sent_to_the_letter(bench: Bench) -> None:
    bench.stub.answer("/loras/a b.safetensors", content(b"x"))
    query = "X-Amz-Credential=k%2F20260501%2fauto&odd=%7e+~!'()*&X-Amz-Signature=ff"
    await bench.fetch(ref=LoraRef(url=f"{bench.stub.url}/loras/a%20b.safetensors?{query}"))
    assert bench.stub.seen[0].query == query


async def test_cookies_and_proxies_of_the_surroundings_play_no_part(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    bench.stub.answer(PATH, content(BODY, Set_Cookie="tracked=yes"))
    assert await bench.fetch() == await bench.fetch() == BODY
    assert "Cookie" not in bench.stub.seen[1].headers


async def test_a_cancelled_fetch_leaves_no_file_behind(bench: Bench) -> None:
    bench.stub.answer(PATH, endless())
    fetching = asyncio.create_task(bench.fetch())
    for _ in range(500):
        if any(path.stat().st_size for path in bench.leases()):
            break
        await asyncio.sleep(0.01)
    else:
        pytest.fail("nothing was written")
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert bench.leases() == bench.objects() == []


async def test_a_full_disk_empties_the_cache_and_the_job_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards `LoraFetcher._with_room`."""
    await bench.fetch()
    bench.stub.put("/loras/other.safetensors", b"other")
    write = fetch_module._HashedFile.write

    def write_where_there_is_room(self: fetch_module._HashedFile, chunk: bytes) -> None:
        if bench.objects():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, chunk)

    monkeypatch.setattr(fetch_module._HashedFile, "write", write_where_there_is_room)
    assert await bench.fetch(ref=bench.ref("/loras/other.safetensors")) == b"other"
    assert len(bench.objects()) == 1


async def test_a_disk_that_stays_full_is_tried_again_later(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await bench.fetch()
    bench.stub.put("/loras/other.safetensors", b"other")

    def write(self: object, chunk: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(fetch_module._HashedFile, "write", write)
        error = await bench.failure(bench.ref("/loras/other.safetensors"))
    assert isinstance(error, LoraFetchInterrupted)
    assert "no space left" in str(error)
    assert bench.objects() == []
    assert await bench.fetch() == BODY


@pytest.mark.parametrize(
    "place", ["http://{}/other/x", "https://{}:1/loras/x", "http://localhost/loras/x", "ftp://{}/x"]
)
async def test_a_forbidden_url_is_refused_without_a_request(bench: Bench, place: str) -> None:
    url = place.format(bench.stub.url.removeprefix("http://").partition(":")[0]) + "?X-Amz-Signature=s3cr3t"
    url = url.replace("https://127.0.0.1:1", "https://evil.example:1")
    error = await bench.failure(LoraRef(url=url))
    assert isinstance(error, LoraRefused)
    assert error.retry_after_s is None
    assert bench.stub.seen == []


class Answers(AbstractResolver):
    """A name server whose answers change from one question to the next."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        if not self.answers:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            ResolveResult(hostname=host, host=address, port=port, family=socket.AF_INET, proto=0, flags=0)
            for address in self.answers.pop(0)
        ]

    async def close(self) -> None:
        self.answers.clear()


def named_store(bench: Bench, *answers: list[str], allow_loopback: bool = False) -> LoraFetcher:
    bench.session = open_session(allow_loopback=allow_loopback, resolver=Answers(*answers))
    rules = HostRules.parse("store.example,localhost", default=HostRules(allow_loopback=allow_loopback))
    return LoraFetcher(bench.session, LoraCache(bench.folder, PLENTY), rules=rules, own_bucket=None, max_bytes=PLENTY)


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::ffff:127.0.0.1"], ["169.254.169.254"]]
)
async def test_an_allowed_name_with_a_forbidden_address_is_refused(bench: Bench, addresses: list[str]) -> None:
    await bench.session.close()
    fetcher = named_store(bench, addresses, allow_loopback=True)
    error = await bench.failure(LoraRef(url="https://store.example/x?X-Amz-Signature=s3cr3t"), fetcher)
    assert isinstance(error, LoraRefused)
    assert "not public" in str(error)


async def test_a_name_that_does_not_resolve_is_tried_again(bench: Bench) -> None:
    await bench.session.close()
    error = await bench.failure(LoraRef(url="https://store.example/x"), named_store(bench))
    assert isinstance(error, LoraFetchInterrupted)
    assert "does not resolve" in str(error)


async def test_localhost_is_resolved_and_served_where_loopback_is_allowed(bench: Bench) -> None:
    await bench.session.close()
    fetcher = named_store(bench, ["127.0.0.1"], allow_loopback=True)
    url = bench.stub.presign("GET", PATH).replace("127.0.0.1", "localhost")
    bench.stub.answer(PATH, content(BODY))
    assert await bench.fetch(fetcher, LoraRef(url=url)) == BODY


def own_bucket(bench: Bench, *, allow_loopback: bool = True) -> tuple[OwnBucket, OwnBucketReader]:
    bucket = OwnBucket(
        endpoint_url=bench.stub.url,
        name="loras",
        access_key_id=SecretStr(ACCESS_KEY),
        secret_access_key=SecretStr(SECRET_KEY),
    )
    rules = HostRules.own(bench.stub.url, "loras", allow_loopback=allow_loopback)
    return bucket, OwnBucketReader(bucket.presign_get, rules)


async def test_a_key_is_signed_with_the_own_credentials_and_cached_like_a_url(bench: Bench) -> None:
    bench.stub.put("/loras/süß & odd/a.safetensors", BODY)
    bucket, reader = own_bucket(bench)
    fetcher = bench.fetcher(own_bucket=reader)
    for _ in range(2):
        assert await bench.fetch(fetcher, LoraRef(key="süß & odd/a.safetensors")) == BODY
    assert "If-None-Match" in bench.stub.seen[1].headers
    bucket.close()


async def test_a_key_on_a_loopback_endpoint_needs_the_flag(bench: Bench) -> None:
    bucket, reader = own_bucket(bench, allow_loopback=False)
    error = await bench.failure(LoraRef(key="style.safetensors"), bench.fetcher(own_bucket=reader))
    assert isinstance(error, LoraRefused)
    bucket.close()


async def test_a_key_without_credentials_names_what_is_missing(bench: Bench) -> None:
    with pytest.raises(LoraFetchInterrupted, match="R2_SECRET_ACCESS_KEY"):
        await bench.fetch(ref=LoraRef(key="style.safetensors"))
