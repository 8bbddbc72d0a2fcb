"""Faults 44 and 45: webhooks that are refused, or whose reply is lost; `python -m producer work` as a process."""

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from producer.webhooks.delivery import DELAYS_S
from tests.chaos.backend import Backend, a_backend
from tests.chaos.tls_receiver import a_tls_receiver
from tests.chaos.world import World
from tests.s3_stub import reset, silence, status

HOOK = "/hook"


@pytest.fixture
def backend(world: World) -> Iterator[Backend]:
    with a_backend(world) as backend:
        yield backend


@pytest.mark.fault(44, "webhook answers 302/410/429/5xx/TLS error/slowly")
def test_a_webhook_that_is_not_taken_is_sent_again_under_the_same_id(world: World, backend: Backend) -> None:
    """Guards `200 <= status < 300` in Sender._read, and `allow_redirects=False` in exchange."""
    answers = {
        "302": status(302, Location=f"{world.store.url}/elsewhere"),
        "429": status(429, Retry_After="6"),
        "503": status(503),
        "slow": silence(),
    }
    with a_tls_receiver(world.folder) as tls:
        for name, answer in answers.items():
            world.store.answer(f"/hook/{name}", answer, status(204))
            world.publish(name, webhook_url=backend.hook(f"/hook/{name}"))
        world.publish("tls", webhook_url=f"{tls.url}{HOOK}")
        world.consumer()
        world.until_ended()
        backend.listen()
        for _ in range(2):  # one of them waits for the slow one
            backend.work(SSL_CERT_FILE=str(tls.trusted))
        world.injected(len(answers) + 1)
        backend.until(lambda: backend.delivery("tls").get("error") == "TLS failed")
        tls.mend()
        backend.until(lambda: backend.delivered(*answers, "tls"))
        world.recovered()
    for name in answers:
        first, second = backend.received(f"/hook/{name}")
        assert first == second
    assert len(tls.bodies) == 1
    assert not backend.received("/elsewhere")
    assert all(row["attempts"] == 2 for row in backend.rows("deliveries"))
    backend.verify()


@pytest.mark.fault(44, "webhook answers 302/410/429/5xx/TLS error/slowly")
def test_a_receiver_that_is_gone_gets_nothing_more_until_it_is_enabled(world: World, backend: Backend) -> None:
    """Guards `if answer.status == _GONE` in Sender._settle, and `outgoing.is_disabled` in Sender.attempt."""
    world.store.answer("/hook/410", status(410), status(204))
    hook = backend.hook("/hook/410")
    world.consumer()
    backend.listen()
    backend.work()
    world.publish("first", webhook_url=hook)
    world.injected()
    backend.until(lambda: [row["state"] for row in backend.rows("deliveries")] == ["disabled"])
    world.publish("second", webhook_url=hook)
    backend.until(lambda: [row["state"] for row in backend.rows("deliveries")] == ["disabled"] * 2)
    assert len(backend.received("/hook/410")) == 1
    url = hook.partition("?")[0]
    assert backend.command("webhooks", "enable", url).wait() == 0
    assert backend.command("webhooks", "retry", "first:1:succeeded", "second:1:succeeded").wait() == 0
    backend.until(lambda: backend.delivered("first", "second"))
    world.recovered()
    backend.verify()


@pytest.mark.fault(45, "webhook delivered, reply lost")
def test_a_webhook_whose_reply_is_lost_comes_again_under_the_same_id(world: World, backend: Backend) -> None:
    """Guards `except ExchangeBroken` in Sender._post."""
    world.store.answer(HOOK, reset(), status(204))
    world.consumer()
    backend.listen()
    backend.work()
    world.publish("a", webhook_url=backend.hook(HOOK))
    world.until(lambda: backend.received(HOOK))
    world.injected()
    backend.until(lambda: backend.delivered("a"))
    world.recovered()
    first, second = backend.received(HOOK)
    assert first == second
    assert first.event_id == "a:1:succeeded"
    backend.verify()


@pytest.mark.fault(45, "webhook delivered, reply lost")
def test_a_worker_killed_before_it_heard_the_reply_leaves_a_delivery_that_goes_on(
    world: World, backend: Backend
) -> None:
    """Guards `self._rows.begin` in Sender.attempt: the attempt is counted, and the next one due, before it is made.

    And `except ValueError` in WebhookQueue._delete: RQ takes a minute and a half to miss the worker, and then cannot
    delete its job.
    """
    world.store.answer(HOOK, silence(), status(204))
    world.consumer()
    backend.listen()
    worker = backend.work()
    world.publish("a", webhook_url=backend.hook(HOOK))
    world.until(lambda: backend.received(HOOK))
    world.injected()
    backend.kill_tree(worker)
    row = backend.delivery("a")
    assert (row["state"], row["attempts"]) == ("pending", 1)
    assert 0 < (row["due_at"].replace(tzinfo=UTC) - datetime.now(UTC)).total_seconds() <= DELAYS_S[0] * 1.1
    backend.work()
    backend.until(lambda: backend.delivered("a"), within_s=180)
    world.recovered()
    first, second = backend.received(HOOK)
    assert first == second
    backend.verify()
