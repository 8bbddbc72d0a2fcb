"""How soon a killed consumer's job is somebody else's."""

import pytest

from tests.chaos.world import LEASE_S, Consumer, World

KILLS = 30


@pytest.mark.fault(0, f"reclaim of a killed consumer's job, lease {LEASE_S:g} s")
def test_a_killed_consumers_job_is_taken_over(world: World) -> None:
    """Guards `reclaimed = await self._intake.reclaim(held)` in Worker._more.

    One of two consumers is killed while it draws; what is measured lasts until the other one has the job on its GPU.
    """
    consumers = [world.consumer(CHAOS_STEP_S="0.05") for _ in range(2)]
    for number in range(KILLS):
        kill_and_wait(world, consumers, f"job-{number}")
    assert world.executions().total() == 2 * KILLS


def kill_and_wait(world: World, consumers: list[Consumer], job_id: str) -> None:
    world.publish(job_id)
    world.until(lambda: started(world, job_id))
    killed = holder(world, job_id, consumers)
    killed.kill()
    world.injected()
    world.until(lambda: len(started(world, job_id)) == 2)
    world.recovered()
    consumers[consumers.index(killed)] = world.consumer(CHAOS_STEP_S="0.05")
    world.until_ended(job_id)


def started(world: World, job_id: str) -> list[str]:
    """The consumers that have had the job on their GPU, one for each attempt."""
    events = [event for event in world.events() if event["type"] == "generation.started"]
    return [event["data"]["consumer"] for event in events if event["data"]["job_id"] == job_id]


def holder(world: World, job_id: str, consumers: list[Consumer]) -> Consumer:
    """Who has the job: a consumer's name is made of its host, its process id, and something unique."""
    pid = int(started(world, job_id)[-1].rsplit("-", 2)[1])
    [found] = [consumer for consumer in consumers if consumer.process.pid == pid]
    return found
