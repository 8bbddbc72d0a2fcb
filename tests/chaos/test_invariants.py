"""That the checks after every fault can fail, and that consumers end with what they began with."""

import pytest

from tests.chaos.invariants import leaks, verify
from tests.chaos.world import LORA, World
from tests.s3_stub import content, reset, status

FILE = b"lora" + bytes(60_000)


@pytest.mark.fault(0, "a signature in a value (the check itself)")
def test_a_signature_is_found_where_it_is_and_gone_when_its_job_has_ended(world: World) -> None:
    world.publish("a")
    world.injected()
    assert leaks(world) == [world.keys.request_streams[1]]
    world.consumer()
    world.until_ended()
    assert leaks(world) == []
    [signature] = world.store.signatures
    for leaked in ("?x-amz-signature=0", signature, signature.encode("utf-16")):
        world.redis.hset(world.keys.job("a"), "payload", leaked)
        with pytest.raises(AssertionError):
            verify(world)
    world.redis.hset(world.keys.job("a"), "payload", "{}")


@pytest.mark.fault(0, "failures of every kind, one after the other")
def test_memory_and_open_files_are_what_they_were_after_failures_of_every_kind(world: World) -> None:
    """Guards what closes connections, bodies and files on the way out of failed attempts."""
    world.injected()
    consumer = world.consumer(SDXL_RETRY_BASE_SECONDS="0", SDXL_RETRY_CAP_SECONDS="0")

    def a_round(number: int) -> tuple[int, int]:
        world.store.answer(LORA, reset(), status(503), status(403), reset(), status(404), content(FILE))
        names = [f"{number}-{one}" for one in range(12)]
        world.publish(*names)
        world.proxy.disconnect_all()
        world.until_ended(*names)
        world.until(lambda: not any(world.redis.xlen(stream) for stream in world.keys.request_streams))
        return consumer.open_files(), consumer.memory_bytes()

    files, memory = zip(*(a_round(number) for number in range(8)), strict=True)
    world.recovered()
    assert max(files[4:]) <= max(files[:4]) + 2, files
    assert memory[-1] < 1.2 * memory[2], memory
