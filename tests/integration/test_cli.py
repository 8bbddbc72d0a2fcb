"""`publish`, `status`, `cancel` and `stats` on a real Redis: what they print, and their exit status."""

import asyncio
import json
from pathlib import Path

import pytest

from consumer.attempt import Attempt
from consumer.keeper import Keeper
from schemas.entries import decode_entry
from schemas.fields import is_job_id
from schemas.keys import Priority
from schemas.requests import GenerationRequest
from tests.integration.cli_kit import Cli
from tests.integration.client_kit import CANARY, FOREIGN_URL, Ender, until
from tests.integration.queue_kit import entries

ACTS = "[red]fox[/red] :smile: \x1b[31m\x9b2J\u202e"


async def requests_of(ann: Ender, priority: Priority = Priority.NORMAL) -> list[GenerationRequest]:
    found = [decode_entry(fields).request for _, fields in await entries(ann.redis, ann.keys.requests(priority))]
    assert None not in found
    return [request for request in found if request]


def test_publish_prints_nothing_but_the_job_id(cli: Cli) -> None:
    job_id = cli.run("publish", "a red fox").strip()
    assert (cli.status, cli.err) == (0, "")
    assert cli.consume(requests_of) == [GenerationRequest(job_id=job_id, prompt="a red fox")]


def test_every_option_of_publish_is_a_field_of_the_request(cli: Cli) -> None:
    options: list[tuple[str, str, object]] = [
        ("--lora-url", "lora_url", f"{FOREIGN_URL}?{CANARY}"),
        ("--lora-scale", "lora_scale", 0.5),
        ("--lora-version", "lora_version", "v2"),
        ("--lora-sha256", "lora_sha256", "ab" * 32),
        ("--negative", "negative_prompt", "blurry"),
        ("--width", "width", 768),
        ("--height", "height", 1344),
        ("--steps", "steps", 30),
        ("--cfg", "cfg", 7.5),
        ("--seed", "seed", 0),
        ("--timeout", "timeout", 90),
        ("--expires-at", "expires_at", "2999-01-02T03:04:05Z"),
        ("--tenant", "tenant", "acme"),
        ("--job-id", "job_id", "job-1"),
        ("--output-key", "output_key", "out/x.png"),
        ("--webhook-url", "webhook_url", "https://hook.example/x"),
    ]
    given = [part for option, _, value in options for part in (option, str(value))]
    cli.run("publish", "a fox", "--priority", "high", "--metadata", '{"user": 7}', *given)
    assert (cli.status, cli.out) == (0, "job-1\n")
    fields = {"prompt": "a fox", "metadata": {"user": 7}, **{field: value for _, field, value in options}}
    expected = GenerationRequest.model_validate_json(json.dumps(fields))
    assert cli.consume(lambda ann: requests_of(ann, Priority.HIGH)) == [expected]


def test_publishing_a_job_again_says_so_on_stderr_alone(cli: Cli) -> None:
    cli.run("publish", "a fox", "--job-id", "job-1")
    assert cli.run("publish", "a fox", "--job-id", "job-1") == "job-1\n"
    assert (cli.status, "was there already: queued" in cli.err) == (0, True)
    document = cli.run_json("publish", "a fox", "--job-id", "job-1")
    assert document == {"job_id": "job-1", "run": 1, "state": "queued", "duplicate": True}


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["publish"], 2, "either a prompt or a --file"),
        (["publish", "a fox", "--file", "-"], 2, "either a prompt or a --file"),
        (["publish", "a fox", "--steps", "5"], 2, "steps"),
        (["publish", "a fox", "--steps", "many"], 2, "--steps"),
        (["publish", " "], 2, "is blank"),
        (["publish", "a fox", "--metadata", "{"], 2, "--metadata: not JSON"),
        (["publish", "a fox", "--metadata", "[]"], 2, "metadata"),
        (["publish", "--file", "-", "--job-id", "x"], 2, "--job-id is one job's own"),
        (["publish", "--file", "nowhere.jsonl"], 2, "nowhere.jsonl"),
        (["publish", "another fox", "--job-id", "taken"], 1, "another request has the job id taken"),
        (["status", "nobody"], 2, "nothing is known"),
        (["cancel", "a b"], 2, "not a job id"),
        (["wait", "nobody"], 2, "nothing is known"),
        (["listen", "--drop-group", "nobody"], 2, "no group nobody"),
        (["fly"], 2, "fly"),
    ],
)
def test_what_cannot_be_done_ends_with_a_status_and_a_line_on_stderr(
    cli: Cli, arguments: list[str], status: int, said: str
) -> None:
    cli.run("publish", "a fox", "--job-id", "taken")
    assert cli.run(*arguments) == ""
    assert (cli.status, said in cli.err) == (status, True), cli.err


def test_an_error_is_a_json_document_where_json_is_asked_for(cli: Cli) -> None:
    document = cli.run_json("publish", "a fox", "--steps", "5")
    assert cli.status == 2
    assert (document["error"]["kind"], document["error"]["error_code"]) == ("RequestRefused", "INVALID_REQUEST")
    cli.run("publish", "a fox")
    full = cli.run_json("publish", "a fox", SDXL_MAX_QUEUE="1")
    assert (cli.status, full["error"]["kind"], full["error"]["retry_after"]) == (1, "QueueFull", 30)


def test_a_file_of_requests_loses_none_of_the_good_ones(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_bytes(
        b'{"job_id": "a", "prompt": "a fox"}\n\n{"prompt": 3}\nnot json\n[]\n'
        b'{"job_id": "b", "prompt": "x", "steps": 40}'
    )
    assert cli.run("publish", "--file", str(file), "--steps", "30", "--tenant", "acme") == "a\nb\n"
    assert cli.status == 2
    assert [line.partition(" prompt")[0].split(":")[1] for line in cli.err.splitlines()] == [
        " request 2",
        " request 3",
        " request 4",
    ]
    requests = cli.consume(requests_of)
    assert [(one.job_id, one.steps, one.tenant) for one in requests] == [("a", 30, "acme"), ("b", 40, "acme")]


def test_a_file_from_stdin_gives_one_json_array_in_its_order(cli: Cli) -> None:
    lines = [json.dumps({"job_id": f"j{number}", "prompt": "x"}) for number in range(230)]
    lines[7] = "{}"
    documents = cli.run_json("publish", "--file", "-", stdin="\n".join(lines))
    assert cli.status == 2
    assert len(documents) == 230
    assert documents[7]["error"]["error_code"] == "INVALID_REQUEST"
    assert documents[229] == {"job_id": "j229", "run": 1, "state": "queued", "duplicate": False}


def test_status_shows_a_job_to_people_and_to_programs(cli: Cli) -> None:
    cli.run("publish", "a fox", "--job-id", "job-1", "--priority", "low")
    shown = dict(line.split(maxsplit=1) for line in cli.run("status", "job-1").splitlines())
    assert (shown["state"].strip(), shown["run"].strip(), shown["priority"].strip()) == ("queued", "1", "low")
    document = cli.run_json("status", "job-1")
    assert (document["state"], document["event"], document["ended_at"]) == ("queued", None, None)
    cli.consume(lambda ann: ann.read_one())
    failed = cli.run_json("cancel", "job-1")
    assert failed == {"job_id": "job-1", "verdict": "cancelled", "state": "queued"}
    assert cli.run_json("status", "job-1")["event"]["id"] == "job-1:1:cancelled"


def test_what_an_error_says_is_shown_and_does_not_act(cli: Cli) -> None:
    cli.run("publish", "a fox", "--job-id", "job-1")
    cli.consume(lambda ann: ann.fail_next(error=ACTS))
    for arguments in (["status", "job-1"], ["wait", "job-1"], ["dead", "list"], ["listen", "--once"]):
        shown = cli.run(*arguments)
        assert "[red]fox[/red] :smile: \\x1b[31m\\x9b2J\\u202e" in shown, arguments
    for arguments in (["status", "job-1"], ["wait", "job-1"], ["dead", "list"]):
        assert cli.run(*arguments, "--json").isascii()
    assert "retry after" in cli.run("status", "job-1")


def test_cancel_says_what_it_found(cli: Cli) -> None:
    cli.run("publish", "a fox", "--job-id", "job-1")
    cli.consume(lambda ann: ann.run_next())
    assert cli.run("cancel", "job-1") == "job-1  asked its consumer to stop (it is running)\n"
    assert cli.run("cancel", "by-hand") == "by-hand  asked; nothing is known of this job yet\n"
    cli.run("publish", "a fox", "--job-id", "job-2")
    assert cli.run("cancel", "job-2") == "job-2  cancelled (it was queued)\n"
    assert cli.run("cancel", "job-2") == "job-2  nothing to cancel: it was cancelled before\n"
    assert cli.status == 0


def test_stats_count_what_waits_and_who_lives(cli: Cli) -> None:
    cli.run("publish", "a fox", "--priority", "high", "--job-id", "job-1")
    assert "no consumer lives" in cli.run("stats")
    cli.consume(announce)
    shown = cli.run("stats").splitlines()
    assert shown[0].split() == ["waiting,", "high", "1"]
    assert shown[-1].split()[-4:] == ["H200", "[x]", "busy", "job-1"]
    assert "no consumer lives" not in "".join(shown)
    document = cli.run_json("stats")
    assert document["waiting"] == {"high": 1, "normal": 0, "low": 0}
    assert (document["consumers"][0]["name"], document["consumers"][0]["live"]) == ("ann", True)


async def announce(ann: Ender) -> None:
    """What a consumer says of itself that has a job on its GPU."""
    keeper = Keeper(ann.leases, ann.presence, {"gpu": "H200 [x]"}, lease_s=30)
    lease, begun = await ann.take()
    attempt = Attempt(lease, GenerationRequest(job_id=lease.job_id, prompt="a fox"), 1, begun)
    attempt.stage = "running"
    keeper.attempts[lease.delivery.place] = attempt
    keeping = asyncio.create_task(keeper.run())

    async def announced() -> bool:
        return bool(await ann.redis.exists(ann.keys.consumer("ann")))

    await until(announced)
    keeping.cancel()


@pytest.mark.parametrize(("state", "shown"), [("busy", "silent"), ("failed", "failed")])
def test_a_consumer_without_a_heartbeat_for_a_minute_is_not_among_the_living(cli: Cli, state: str, shown: str) -> None:
    async def die(ann: Ender) -> None:
        await ann.presence.heartbeat({"gpu": "H200", "state": state, "job": "job-1"})
        seconds, _ = await ann.redis.time()
        await ann.redis.zadd(ann.keys.consumers, {"ann": (seconds - 61) * 1000})

    cli.consume(die)
    said = cli.run("stats")
    assert "no consumer lives" in said
    assert said.splitlines()[-1].split()[-3:] == ["H200", shown, "job-1"]
    [consumer] = cli.run_json("stats")["consumers"]
    assert (consumer["live"], consumer["state"]) == (False, state)


def test_a_redis_out_of_reach_is_status_3_and_keeps_its_password(cli: Cli) -> None:
    url = "redis://user:canary@127.0.0.1:1/0"
    for arguments in (["stats"], ["publish", "a fox"], ["wait", "x"], ["listen", "--once"]):
        assert cli.run(*arguments, REDIS_URL=url) == ""
        assert (cli.status, len(cli.err.splitlines())) == (3, 1), (arguments, cli.err)
        assert "canary" not in cli.err
    assert cli.run_json("stats", REDIS_URL=url)["error"]["kind"] == "ConnectionError"
    assert "canary" not in cli.out + cli.err


def test_where_redis_fails_the_jobs_that_may_be_queued_are_named(cli: Cli) -> None:
    cli.run("publish", "a fox", "--job-id", "job-1", REDIS_URL="redis://127.0.0.1:1/0")
    assert "may be queued (publish again with --job-id): job-1\n" in cli.err
    [new] = cli.run_json("publish", "a fox", REDIS_URL="redis://127.0.0.1:1/0")["error"]["job_ids"]
    assert is_job_id(new)


def test_what_was_published_before_redis_failed_is_told_apart_from_what_may_be(cli: Cli) -> None:
    async def spoil(ann: Ender) -> None:
        await ann.redis.set(ann.keys.job("j149"), "no hash")

    cli.consume(spoil)
    names = [f"j{number}" for number in range(230)]
    lines = "\n".join(json.dumps({"job_id": name, "prompt": "x"}) for name in names)
    *jobs, failure = cli.run_json("publish", "--file", "-", stdin=lines)
    assert (cli.status, [job["job_id"] for job in jobs]) == (3, names[:100])
    assert failure["error"]["job_ids"] == names[100:200]
    assert cli.run("publish", "--file", "-", stdin=lines).split() == names[:100]
    assert f"from request 101 on; may be queued (publish again with job_id): {' '.join(names[100:200])}\n" in cli.err


@pytest.mark.parametrize(
    "environment",
    [
        {"REDIS_URL": "redis://:canary@127.0.0.1/0?ssl=true"},
        {"REDIS_URL": "redis://:canary@127.0.0.1/0?retry=3"},
        {"REDIS_URL": "http://:canary@127.0.0.1/0"},
        {"REDIS_URL": "redis://:p#canary@127.0.0.1/0"},
        {"REDIS_URL": "redis://:p/canary@127.0.0.1:canary/0"},
        {"SDXL_MAX_QUEUE": "canary"},
        {"DATABASE_URL": "canary"},
        {"DATABASE_URL": "nosuch://:canary@h/x"},
        {"DATABASE_URL": "mysql://u:canary@h/x"},
        {"DATABASE_URL": "postgresql://u:p@h:canary/x"},
        {"DATABASE_URL": "sqlite:///x.db?timeout=canary"},
    ],
)
def test_a_setting_that_makes_no_sense_is_named_and_not_repeated(cli: Cli, environment: dict[str, str]) -> None:
    assert cli.run("listen", "--once", **environment) == ""
    assert cli.status == 2, cli.err
    [name] = environment
    assert name in cli.err
    assert "canary" not in cli.err
