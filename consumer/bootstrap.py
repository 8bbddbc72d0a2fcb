"""The one place where a consumer is built and wired, by hand."""

import gc
import os
import socket
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import structlog
from redis.exceptions import RedisError

from consumer.artifacts import Artifacts
from consumer.bucket import OwnBucket
from consumer.engine import Engine
from consumer.engine.fast.fields import UnknownModel
from consumer.errors import ModelBroken
from consumer.keeper import Keeper
from consumer.lora.cache import LoraCache
from consumer.lora.fetch import LoraFetcher, OwnBucketReader
from consumer.outcomes import Outcomes, RetryPolicy
from consumer.queue import Intake, Leases, Presence, connect, connect_for_blocking_reads
from consumer.settings import ConsumerSettings
from consumer.stages import Stages
from consumer.storage import ArtifactStore, UploadUrls
from consumer.worker import BLOCK_S, Worker
from schemas.keys import Keys
from schemas.net.http import open_session
from schemas.net.urls import HostRules
from schemas.redact import redact_text

log = structlog.get_logger(__name__)

_SWITCH_INTERVAL_S = 0.0005


def consumer_name() -> str:
    """Unique to one boot: two processes must never be taken for each other, nor one for its predecessor."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def load_engine(settings: ConsumerSettings) -> Engine:
    """Loads the base model, and draws once so that the first job finds it warm.

    Raises ModelBroken.
    """
    engine = _choose_engine(settings)
    engine.warm_up()
    _share_python()
    log.info("model.loaded", base_model=engine.base_model, gpu=engine.gpu)
    return engine


def _share_python() -> None:
    """Keeps Python's threads from waiting for each other; docs/performance.md has the figures."""
    # The GPU's thread gives the lock away with every kernel it launches. By default whoever parses a LoRA keeps it for
    # 5 ms then, and a picture begins with a dozen launches.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    # What is loaded by now stays: looking through all of it for garbage stops every thread for 0.4 s.
    gc.freeze()


def _choose_engine(settings: ConsumerSettings) -> Engine:
    # torch and what draws with it take seconds to import: only the engine that is chosen is paid for
    reason = _reason_for_stock(settings)
    if reason is None:
        try:
            from consumer.engine.fast.engine import FastEngine

            engine = _load(FastEngine.load, settings)
        except UnknownModel as unknown:
            if settings.speed == "fast":
                raise ModelBroken(f"The fast engine does not know this model: {unknown}") from None
            reason = str(unknown)
        else:
            log.info("engine.chosen", engine="fast")
            return engine
    from consumer.engine.stock import StockEngine

    stock = _load(StockEngine.load, settings)
    log.info("engine.chosen", engine="stock", reason=reason)
    return stock


def _reason_for_stock(settings: ConsumerSettings) -> str | None:
    if settings.speed == "stock":
        return "SDXL_SPEED is stock"
    if settings.speed == "auto" and not settings.device.startswith("cuda"):
        return f"SDXL_DEVICE is {settings.device}"
    if settings.speed == "auto" and settings.dtype == "float32":
        return "SDXL_DTYPE is float32"
    return None


def _load(load: Callable[..., Engine], settings: ConsumerSettings) -> Engine:
    token = None if settings.hub_token is None else settings.hub_token.get_secret_value()
    return load(settings.model, vae=settings.vae, device=settings.device, dtype=settings.dtype, hub_token=token)


async def record_broken_model(settings: ConsumerSettings, name: str, error: ModelBroken) -> None:
    """Says among the living why this consumer never came to life. Redis being away is no reason to wait."""
    redis = connect(settings.redis_url.get_secret_value())
    try:
        presence = Presence(redis, Keys(settings.prefix), name)
        await presence.heartbeat(
            {"state": "failed", "error_code": error.code, "error": redact_text(str(error)), "model": settings.model}
        )
    except RedisError as cause:
        log.warning("redis.out_of_reach", step="record_broken_model", error=type(cause).__name__)
    finally:
        await redis.aclose()


@dataclass(frozen=True, slots=True)
class _Storage:
    fetcher: LoraFetcher
    store: ArtifactStore
    uploads: UploadUrls


@asynccontextmanager
async def wire(settings: ConsumerSettings, engine: Engine, name: str) -> AsyncIterator[Worker]:
    """The worker of one consumer; its connections are closed when the block ends."""
    async with AsyncExitStack() as stack:
        url = settings.redis_url.get_secret_value()
        redis, reader = connect(url), connect_for_blocking_reads(url, block_s=BLOCK_S)
        stack.push_async_callback(redis.aclose)
        stack.push_async_callback(reader.aclose)
        keys = Keys(settings.prefix)
        intake = Intake(redis, reader, keys, name, lease_s=settings.lease_s)
        leases = Leases(redis, keys, name, job_ttl_s=settings.job_ttl_s)
        presence = Presence(redis, keys, name)
        record = {"gpu": engine.gpu, "model": engine.base_model, "host": socket.gethostname(), "pid": str(os.getpid())}
        storage = await _wire_storage(settings, stack)
        artifacts = Artifacts(storage.store, storage.uploads, leases)
        yield Worker(
            intake,
            leases,
            Keeper(leases, presence, record, lease_s=settings.lease_s),
            Stages(engine, storage.fetcher, artifacts, leases, name, stall_s=settings.stall_s),
            Outcomes(leases, name, RetryPolicy(settings.max_attempts, settings.retry_base_s, settings.retry_cap_s)),
            settings,
        )


async def _wire_storage(settings: ConsumerSettings, stack: AsyncExitStack) -> _Storage:
    bucket = OwnBucket(
        endpoint_url=settings.r2_endpoint_url,
        name=settings.r2_bucket,
        access_key_id=settings.r2_access_key_id,
        secret_access_key=settings.r2_secret_access_key,
    )
    stack.callback(bucket.close)
    own = HostRules.own(settings.r2_endpoint_url, settings.r2_bucket, allow_loopback=settings.allow_loopback)
    session = await stack.enter_async_context(open_session(allow_loopback=settings.allow_loopback))
    fetcher = LoraFetcher(
        session,
        LoraCache(settings.lora_cache_dir, int(settings.lora_cache_gb * 1e9)),
        rules=HostRules.parse(settings.lora_allowed_hosts, default=own),
        own_bucket=None if bucket.missing else OwnBucketReader(bucket.presign_get, own),
        max_bytes=int(settings.lora_max_mb * 1e6),
    )
    uploads = UploadUrls(session, HostRules.parse(settings.upload_allowed_hosts, default=own))
    return _Storage(fetcher, ArtifactStore(bucket, public_url=settings.r2_public_url), uploads)
