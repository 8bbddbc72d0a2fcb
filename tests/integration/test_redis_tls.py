"""`rediss://` for real: a TLS end in front of a Redis, right and wrong certificates, and what is said of them."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from redis import exceptions
from redis.asyncio import Redis

from consumer import queue as consumers
from demo.servers import RedisServer
from producer import queue as producers
from producer.webhooks.queue import WebhookQueue
from schemas.keys import Keys
from tests.integration.cli_kit import Cli, a_cli
from tests.integration.client_kit import Ender, a_client, begun, blocked

PASSWORD = "c4n4ry"
Connect = Callable[[str], Redis]
CONNECT: dict[str, Connect] = {
    "the client's": producers.connect,
    "the client's blocking reader": lambda url: producers.connect_for_blocking_reads(url, block_s=1),
    "a consumer's": consumers.connect,
    "a consumer's blocking reader": lambda url: consumers.connect_for_blocking_reads(url, block_s=1),
}


class Authority:
    """A certificate authority of the test's own; `ca` is its certificate's file."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        self.ca = folder / "ca.pem"
        constraint = x509.BasicConstraints(ca=True, path_length=None)
        signed = self._builder(self._name, self._key.public_key()).add_extension(constraint, critical=True)
        self.ca.write_bytes(self._pem(signed))

    def context(self, host: str) -> ssl.SSLContext:
        """What a server at `host`, an address, identifies itself with."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address(host))])
        file = self._folder / f"{host}.pem"
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        file.write_bytes(private + self._pem(self._builder(name, key.public_key()).add_extension(names, False)))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder(subject_name=subject, issuer_name=self._name, public_key=key)
        builder = builder.serial_number(x509.random_serial_number())
        return builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))

    def _pem(self, builder: x509.CertificateBuilder) -> bytes:
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@asynccontextmanager
async def tls_in_front(port: int, context: ssl.SSLContext) -> AsyncIterator[int]:
    """The port of a TLS end that hands on to Redis' own `port`."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while some := await reader.read(65536):
            writer.write(some)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_redis, to_redis = await asyncio.open_connection("127.0.0.1", port)
        pumps: list[Awaitable[None]] = [pump(reader, to_redis), pump(from_redis, writer)]
        await asyncio.gather(*pumps, return_exceptions=True)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "right")


@pytest.fixture(scope="module")
def other_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "other")


@pytest.fixture
async def tls_port(redis_at: RedisServer, authority: Authority) -> AsyncIterator[int]:
    async with tls_in_front(redis_at.port, authority.context("127.0.0.1")) as port:
        yield port


def url_for(port: int, authority: Authority) -> str:
    return f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={authority.ca}"


async def test_a_job_goes_all_the_way_over_tls(redis: Redis, keys: Keys, tls_port: int, authority: Authority) -> None:
    url = url_for(tls_port, authority)
    consumer = Ender(consumers.connect(url), keys, "ann")
    async with a_client(url, keys) as client:
        await client.submit(job_id="a", prompt="a red fox")
        waiting = begun(client.result("a"))
        await blocked(redis)
        await consumer.succeed_next()
        assert (await waiting).data.job_id == "a"
    webhooks = WebhookQueue(url, keys.prefix)
    await asyncio.to_thread(webhooks.enqueue, ["a:1:succeeded"])
    assert await asyncio.to_thread(lambda: webhooks.rq.count) == 1
    webhooks.close()
    await consumer.redis.aclose()


async def refusal(connect: Connect, url: str) -> str:
    redis = connect(url)
    try:
        with pytest.raises(exceptions.ConnectionError) as caught:
            await redis.ping()
    finally:
        await redis.aclose()
    return str(caught.value)


@pytest.mark.parametrize("connect", CONNECT.values(), ids=CONNECT)
async def test_an_unknown_authority_is_refused(tls_port: int, other_authority: Authority, connect: Connect) -> None:
    url = url_for(tls_port, other_authority).replace("//", f"//:{PASSWORD}@")
    said = await refusal(connect, url)
    assert "CERTIFICATE_VERIFY_FAILED" in said
    assert PASSWORD not in said


@pytest.mark.parametrize("connect", CONNECT.values(), ids=CONNECT)
async def test_a_certificate_for_another_host_is_refused(
    redis_at: RedisServer, authority: Authority, connect: Connect
) -> None:
    """Guards redis-py's `ssl_check_hostname`, which no option of ours may turn off."""
    async with tls_in_front(redis_at.port, authority.context("127.0.0.9")) as port:
        said = await refusal(connect, url_for(port, authority).replace("//", f"//:{PASSWORD}@"))
    assert "IP address mismatch" in said
    assert PASSWORD not in said


async def test_a_command_says_that_it_was_tls_and_not_the_password(
    redis_at: RedisServer, keys: Keys, tls_port: int, other_authority: Authority, tmp_path: Path
) -> None:
    url = url_for(tls_port, other_authority).replace("//", f"//:{PASSWORD}@")

    def stats(cli: Cli) -> str:
        cli.run("stats", REDIS_URL=url)
        return cli.err

    with a_cli(redis_at, keys, tmp_path) as cli:
        said = await asyncio.to_thread(stats, cli)
        assert cli.status == 3
    assert "SSL" in said
    assert "certificate" in said
    assert PASSWORD not in said
    assert "Traceback" not in said
