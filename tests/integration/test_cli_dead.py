"""`dead` on a real Redis: what it shows, replays and drops, and its exit status."""

import json
from typing import Any

import pytest

from tests.integration import letter_kit
from tests.integration.cli_kit import Cli
from tests.integration.client_kit import CANARY, FOREIGN_URL, Ender
from tests.integration.queue_kit import add

EVERY_FILTER = [
    *("--error-code", "TIMEOUT", "--error-code", "GENERATION_FAILED", "--older-than", "0s", "--newer-than", "1d"),
    *("--tenant", "acme", "--lora", "loras/ann", "--text", "BLACK", "--job", "job-1"),
]


def a_dead_job(cli: Cli, job_id: str = "job-1", *options: str) -> str:
    """Publishes a job that fails; returns the entry id of its dead letter."""
    cli.run("publish", "a fox", "--job-id", job_id, *options)
    cli.consume(lambda ann: ann.fail_next(error="a black picture"))
    entry_id: str = cli.run_json("dead", "list")[-1]["entry_id"]
    return entry_id


def an_unreadable_letter(cli: Cli) -> str:
    async def bury(ann: Ender) -> str:
        return await add(ann.redis, ann.keys.dead, {"raw": b"\xff\x1b[31m", "source": "s", "died_at": "1000"})

    return cli.consume(bury)


def waiting(cli: Cli) -> list[tuple[str, str]]:
    return cli.consume(lambda ann: letter_kit.runs(ann.redis, ann.keys))


def replay_json(cli: Cli, *arguments: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The letters' lines and the summary."""
    *letters, last = map(json.loads, cli.run("dead", "replay", *arguments, "--json").splitlines())
    return letters, last["summary"]


def left(cli: Cli) -> list[str | None]:
    return [letter["job_id"] for letter in cli.run_json("dead", "list")]


def test_dead_letters_are_listed_and_shown_to_people_and_to_programs(cli: Cli) -> None:
    assert cli.run("dead", "list") == "no dead letters\n"
    entry_id = a_dead_job(cli, "job-1", "--lora-url", f"{FOREIGN_URL}?{CANARY}")
    head, row = cli.run("dead", "list").splitlines()
    assert head.split() == ["entry", "died", "at", "job", "run", "code", "error"]
    assert row.split()[0] == entry_id
    assert row.rstrip().endswith("job-1  1    GENERATION_FAILED  a black picture")
    shown = cli.run("dead", "show", entry_id)
    assert "a black picture" in shown
    assert FOREIGN_URL in shown
    [document] = cli.run_json("dead", "list", "--error-code", "GENERATION_FAILED", "--limit", "1")
    assert document == cli.run_json("dead", "show", entry_id)
    assert (document["request"]["prompt"], document["run"], document["raw"]) == ("a fox", 1, None)
    assert cli.run_json("dead", "list", "--error-code", "TIMEOUT") == []
    assert "canary" not in shown + json.dumps(document)


def test_every_filter_has_an_option(cli: Cli) -> None:
    a_dead_job(cli, "job-1", "--tenant", "acme", "--lora-key", "loras/ann.safetensors")
    a_dead_job(cli, "job-2")
    assert [letter["job_id"] for letter in cli.run_json("dead", "list", *EVERY_FILTER)] == ["job-1"]
    misses = [
        ("--error-code", "TIMEOUT"),
        ("--older-than", "1.5h"),
        ("--newer-than", "0s"),
        ("--tenant", "other"),
        ("--lora", "loras/bob"),
        ("--text", "white"),
        ("--job", "job-3"),
    ]
    for option, value in misses:
        assert cli.run_json("dead", "list", option, value) == [], option


def test_a_letter_that_cannot_be_read_is_shown_as_far_as_it_goes_and_kept(cli: Cli) -> None:
    entry_id = an_unreadable_letter(cli)
    assert "cannot be read" in cli.run("dead", "list")
    assert "\\x1b[31m" in cli.run("dead", "show", entry_id)
    assert cli.run_json("dead", "show", entry_id)["raw"] == "\ufffd\x1b[31m"
    assert cli.run("dead", "replay", entry_id).startswith(f"{entry_id}  -  undecodable  no request can be read")
    assert (cli.status, left(cli)) == (1, [None])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["replay"], "entry ids, or filters, or --all"),
        (["replay", "--limit", "3"], "entry ids, or filters, or --all"),
        (["replay", "1-1", "--all"], "entry ids, or filters, or --all"),
        (["replay", "1-1", "--tenant", "a"], "entry ids, or filters, or --all"),
        (["replay", "--all", "--job", "a"], "entry ids, or filters, or --all"),
        (["replay", "1-1", "--limit", "1"], "--limit goes with"),
        (["replay", "job-1"], "job-1 is not an entry id"),
        (["replay", "--all", "--set", "steps=7"], "steps: Input should be greater"),
        (["replay", "--all", "--set", "steps=many"], "steps: Input should be a valid integer"),
        (["replay", "--all", "--set", "stepz=30"], "stepz: Extra inputs"),
        (["replay", "--all", "--set", "steps"], "--set takes FIELD=VALUE"),
        (["replay", "--all", "--set", "steps=30", "--set", "steps=31"], "--set names steps twice"),
        (["replay", "--all", "--set", "job_id=a"], "keeps its job_id"),
        (["replay", "--all", "--set", "lora_key=a", "--lora-url", "https://h/x"], "--lora-url excludes --set lora_key"),
        (["replay", "--all", "--set", "output_key=a.png"], "one job's own"),
        (["replay", "--all", "--lora-url", "canary"], "lora_url: is not a URL"),
        (["replay", "--all", "--rate", "0"], "--rate: the rate is above 0"),
        (["replay", "--tenant", ""], "tenant is empty"),
        (["replay", "--older-than", "2"], "2 is not an age"),
        (["replay", "--newer-than", "999999999d"], "longer than the calendar"),
        (["list", "--text", ""], "text is empty"),
        (["drop"], "entry ids, or filters, or --all"),
        (["drop", "--all"], "would drop 2 dead letters for good"),
        (["drop", "--tenant", ""], "tenant is empty"),
        (["drop", "--error-code", "GENERATION_FAILED"], "would drop 2 dead letters for good"),
        (["show", "1-1"], "no dead letter"),
        (["show", "99999999999999999999-0"], "no dead letter"),
    ],
)
def test_what_is_not_clear_or_not_possible_is_refused_and_nothing_is_done(
    cli: Cli, arguments: list[str], said: str
) -> None:
    for job_id in ("job-1", "job-2"):
        a_dead_job(cli, job_id)
    assert cli.run("dead", *arguments) == ""
    assert (cli.status, said in cli.err, "canary" in cli.err) == (2, True, False), cli.err
    assert (left(cli), waiting(cli)) == (["job-1", "job-2"], [])


def test_a_dry_run_says_what_a_replay_then_does(cli: Cli) -> None:
    entry_id = a_dead_job(cli)
    [would], summary = replay_json(cli, entry_id, "--dry-run")
    assert (would["verdict"], would["run"], summary["verdicts"]) == ("would_replay", 2, {"would_replay": 1})
    assert (waiting(cli), left(cli)) == ([], ["job-1"])
    assert cli.run("dead", "replay", entry_id).startswith(f"{entry_id}  job-1  replayed\n")
    assert (cli.status, waiting(cli), left(cli)) == (0, [("job-1", "2")], [])


@pytest.mark.parametrize("chosen", [["--all"], ["--error-code", "GENERATION_FAILED"], ["--newer-than", "1h"]])
def test_many_letters_are_replayed_with_a_summary_and_no_line_each(cli: Cli, chosen: list[str]) -> None:
    for job_id in ("job-1", "job-2", "job-3"):
        a_dead_job(cli, job_id)
    lines = cli.run("dead", "replay", "--limit", "2", *chosen).splitlines()
    assert [line.split() for line in lines] == [["error", "code", "replayed"], ["GENERATION_FAILED", "2"], ["all", "2"]]
    assert (cli.status, cli.err, waiting(cli)) == (0, "", [("job-1", "2"), ("job-2", "2")])
    letters, summary = replay_json(cli, *chosen)
    assert [(letter["job_id"], letter["verdict"]) for letter in letters] == [("job-3", "replayed")]
    assert summary == {
        "letters": 1,
        "verdicts": {"replayed": 1},
        "error_codes": {"GENERATION_FAILED": {"replayed": 1}},
        "not_reached": 0,
        "retry_after": None,
    }
    assert cli.run("dead", "replay", *chosen) == "no dead letters\n"
    assert cli.status == 0


def test_what_could_not_be_replayed_has_a_line_and_the_summary_counts_by_error_code(cli: Cli) -> None:
    unreadable = an_unreadable_letter(cli)
    a_dead_job(cli, "job-1")
    refused = a_dead_job(cli, "job-2", "--lora-url", f"{FOREIGN_URL}?{CANARY}")
    lines = [line.split() for line in cli.run("dead", "replay", "--all").splitlines()]
    assert [line[:3] for line in lines[:2]] == [[unreadable, "-", "undecodable"], [refused, "job-2", "refused"]]
    assert lines[2:] == [
        ["error", "code", "undecodable", "refused", "replayed"],
        ["none", "1", "0", "0"],
        ["GENERATION_FAILED", "0", "1", "1"],
        ["all", "1", "1", "1"],
    ]
    assert (cli.status, left(cli)) == (1, [None, "job-2"])
    assert "canary" not in cli.out


def test_a_letter_that_is_named_and_not_there_keeps_none_of_the_others_from_going(cli: Cli) -> None:
    first, second = a_dead_job(cli, "job-1"), a_dead_job(cli, "job-2")
    cli.run("dead", "replay", first)
    letters, _ = replay_json(cli, first, second, second)
    assert [letter["verdict"] for letter in letters] == ["gone", "replayed"]
    assert (cli.status, waiting(cli)) == (2, [("job-1", "2"), ("job-2", "2")])


def test_values_are_json_or_else_strings(cli: Cli) -> None:
    entry_id = a_dead_job(cli, "job-1", "--seed", "7")
    sets = ["steps=30", "seed=null", "prompt=a = b", 'tenant="7"', 'metadata={"a": [1]}', "negative_prompt="]
    letters, _ = replay_json(cli, entry_id, *(part for one in sets for part in ("--set", one)))
    assert letters[0]["verdict"] == "replayed", letters

    async def payload(ann: Ender) -> Any:
        [fields] = await letter_kit.waiting(ann.redis, ann.keys)
        return json.loads(fields[b"payload"])

    expected = {"job_id": "job-1", "prompt": "a = b", "steps": 30, "tenant": "7", "metadata": {"a": [1]}}
    assert cli.consume(payload) == expected


def test_a_replay_that_needs_a_fresh_url_is_refused_until_it_gets_one(cli: Cli) -> None:
    entry_id = a_dead_job(cli, "job-1", "--lora-url", f"{FOREIGN_URL}?{CANARY}")
    [refused], _ = replay_json(cli, entry_id)
    assert (cli.status, refused["verdict"], "lora_url" in refused["reason"]) == (1, "refused", True)
    cli.run("dead", "replay", entry_id, "--lora-url", f"{FOREIGN_URL}?fresh={CANARY}")
    assert (cli.status, waiting(cli), "canary" in cli.out + cli.err) == (0, [("job-1", "2")], False)


def test_a_letter_that_is_named_may_get_an_output_key_of_its_own(cli: Cli) -> None:
    entry_id = a_dead_job(cli)
    letters, _ = replay_json(cli, entry_id, "--set", "output_key=again/1.png")
    assert letters[0]["verdict"] == "replayed"


def test_a_full_queue_stops_the_replay_and_says_when_to_come_back(cli: Cli) -> None:
    for number in range(4):
        a_dead_job(cli, f"job-{number}")
    cli.run("dead", "replay", "--all", SDXL_MAX_QUEUE="1")
    assert cli.status == 1
    assert "not all had room: run it again in 1 s" in cli.err
    assert "2 not reached: the same command goes on from here" in cli.err
    assert left(cli) == ["job-1", "job-2", "job-3"]
    [full, summary] = map(json.loads, cli.run("dead", "replay", "--all", "--json", SDXL_MAX_QUEUE="1").splitlines())
    assert (full["verdict"], full["retry_after"], summary["summary"]["not_reached"]) == ("queue_full", 1, 2)
    assert summary["summary"]["retry_after"] == 1
    assert [letter["verdict"] for letter in replay_json(cli, "--all")[0]] == ["replayed"] * 3


def test_what_is_named_is_dropped_for_good_without_a_question(cli: Cli) -> None:
    entry_id = a_dead_job(cli)
    assert cli.run("dead", "drop", entry_id, "--dry-run") == "would drop 1 of 1\n"
    assert cli.run("dead", "drop", entry_id, entry_id) == "dropped 1 of 1\n"
    assert cli.status == 0
    assert cli.run_json("dead", "drop", entry_id) == {"dropped": 0}
    assert cli.status == 2
    assert cli.run_json("dead", "drop", entry_id, "--dry-run") == {"would_drop": 0}


def test_what_is_described_is_dropped_when_yes_is_given_and_nothing_else_is(cli: Cli) -> None:
    for job_id, tenant in (("job-1", "acme"), ("job-2", "other"), ("job-3", "acme")):
        a_dead_job(cli, job_id, "--tenant", tenant)
    assert cli.run("dead", "drop", "--tenant", "acme", "--dry-run") == "would drop 2 of 2\n"
    assert cli.run("dead", "drop", "--tenant", "acme", "--limit", "1", "--yes") == "dropped 1 of 1\n"
    assert left(cli) == ["job-2", "job-3"]
    assert cli.run_json("dead", "drop", "--all", "--yes") == {"dropped": 2}
    assert cli.run("dead", "drop", "--all") == "dropped 0 of 0\n"
    assert (cli.status, left(cli)) == (0, [])
