"""Bad commands: what is shown acts on nobody, and what is refused changes nothing.

The 18 of the catalogue, the commands' and the pages':

| bad input | test |
| --- | --- |
| markup in a prompt | test_bad_commands.py::test_what_strangers_wrote_is_shown_as_text |
| markup in an error | test_bad_commands.py::test_what_strangers_wrote_is_shown_as_text |
| markup in a LoRA's name | test_bad_commands.py::test_what_strangers_wrote_is_shown_as_text |
| markup on the demo's page | ../unit/test_gallery.py::test_markup_in_what_others_wrote_is_text |
| a CSV formula | test_bad_commands.py::test_no_command_writes_csv_and_a_formula_is_text |
| a change of state by GET | test_bad_calls.py::test_no_get_changes_anything |
| a cross-site POST | test_bad_calls.py::test_a_page_of_another_site_gets_nothing_done |
| a missing token | test_gateway_http.py::test_every_route_but_health_needs_the_token |
| a wrong token | test_bad_calls.py::test_a_wrong_token_is_compared_in_constant_time |
| traversal in ids, commands | test_bad_commands.py::test_an_id_that_is_a_path_names_nothing |
| traversal in ids, calls | test_bad_calls.py::test_an_id_that_is_a_path_is_not_found |
| page -1 | test_bad_commands.py::test_a_limit_that_is_none_is_bad_usage |
| page 1e9 | test_bad_commands.py::test_a_limit_that_is_none_is_bad_usage |
| replay twice | test_bad_commands.py::test_a_second_replay_finds_nothing_and_changes_nothing |
| replay of the unknown | test_bad_commands.py::test_a_replay_of_the_unknown_changes_nothing |
| replay of the already succeeded | test_bad_commands.py::test_a_replay_of_a_job_that_has_succeeded_since_makes_no_run |
| replay of poison again | test_bad_commands.py::test_poison_that_is_replayed_again_makes_one_run_each_time |
| replay of 10k | test_bad_commands.py::test_thousands_are_replayed_once_each |
| replay of 10k, interrupted | test_replay_interrupted.py::test_two_replays_side_by_side_share_the_letters |
| a dry run writes nothing | test_bad_commands.py::test_a_dry_run_writes_nothing |
| a letter that cannot be decoded | test_bad_commands.py::test_letters_that_cannot_be_decoded_are_shown_and_kept |
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
from sqlalchemy import Engine

from producer.cli.app import app
from producer.database import open_engine
from tests import event_kit
from tests.integration import letter_kit
from tests.integration.bad_commands_kit import (
    Letter,
    a_dead_job,
    bury,
    dumped,
    fail,
    letters,
    publish,
    replayed,
    start,
    succeed,
)
from tests.integration.cli_kit import Cli
from tests.integration.webhook_kit import Bench
from tests.lora_bytes import entry, with_tensors
from tests.s3_stub import S3Stub

MARKUP = "[red]r[/red] [link=https://evil.example]l[/] :fox: [/]"
ACTING = "\x1b]0;owned\x07\x1b[31m\x9b2J\u202e\r\b"
FORMULA = '=HYPERLINK("https://evil.example","a")'
TABLE = re.findall(r"\| ([^|]+) \| (\S+)::(\w+) \|", __doc__)


@pytest.mark.parametrize(("bad", "file", "test"), TABLE, ids=[f"{bad}" for bad, _, _ in TABLE])
def test_each_of_the_catalogue_has_its_test(bad: str, file: str, test: str) -> None:
    source = (Path(__file__).parent / file).read_text()
    assert len(re.findall(rf"^(?:async )?def {test}\(", source, re.MULTILINE)) == 1


def test_the_catalogue_counts_18() -> None:
    assert len(TABLE) >= 18


def is_harmless(shown: str) -> bool:
    return all(letter.isprintable() or letter == "\n" for letter in shown)


def test_what_strangers_wrote_is_shown_as_text(cli: Cli, tmp_path: Path) -> None:
    """Guards `output.visible`, and `markup=False, emoji=False` of `output.stdout`."""
    lora = "loras/[red]a[/red] :fox:.safetensors"
    entry_id = a_dead_job(cli, "job-1", "--lora-key", lora, error=f"{MARKUP} {ACTING}", prompt=MARKUP)
    file = tmp_path / "[red]a.safetensors"
    file.write_bytes(with_tensors({f"{MARKUP[:5]}.lora_A.weight": entry(0, 16)}))
    show: list[tuple[str, ...]] = [
        ("status", "job-1"),
        ("dead", "list"),
        ("dead", "show", entry_id),
        ("lora", "check", str(file)),
    ]
    shown = {words: cli.run(*words) for words in show}
    shown["replay",] = cli.run("dead", "replay", entry_id, "--set", f"lora_url=https://h.example/{MARKUP}{ACTING}")
    assert all(map(is_harmless, shown.values())), shown
    assert is_harmless(cli.err)
    assert MARKUP in shown["dead", "list"]
    assert "\\x1b]0;owned\\x07\\x1b[31m\\x9b2J\\u202e\\r\\x08" in shown["dead", "list"]
    assert shown["dead", "show", entry_id].count(MARKUP) == 2
    assert lora in shown["dead", "show", entry_id]
    assert str(file) in shown["lora", "check", str(file)]


def test_what_strangers_wrote_is_escaped_for_programs(cli: Cli) -> None:
    """Guards `output.print_json`: all ASCII, so that it acts on no terminal either."""
    entry_id = a_dead_job(cli, error=ACTING)
    for words in (["dead", "list"], ["dead", "show", entry_id], ["status", "job-1"]):
        shown = cli.run(*words, "--json")
        assert shown.isascii()
        assert is_harmless(shown)


def test_what_an_endpoint_answered_is_shown_as_text(cli: Cli, tmp_path: Path) -> None:
    """Guards `output.table` and `output.facts_grid`, through which deliveries are shown."""
    engine: Engine = open_engine(cli.environment["DATABASE_URL"])
    bench = Bench(engine, S3Stub("http://127.0.0.1:1"))
    event_id = bench.add(event_kit.failed("job-1"), "https://hooks.example/[red]")
    bench.change(event_id, error=f"{MARKUP} {ACTING}")
    engine.dispose()
    for words in (["webhooks", "list"], ["webhooks", "show", event_id]):
        shown = cli.run(*words)
        assert is_harmless(shown)
        assert MARKUP in shown


def commands(group: Any = None, name: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    root: Any = group or typer.main.get_command(app)
    for word, each in root.commands.items():
        found |= commands(each, f"{name}{word} ") if hasattr(each, "commands") else {name + word: each}
    return found


def test_no_command_writes_csv_and_a_formula_is_text(cli: Cli) -> None:
    """There is no CSV: commands print tables for people and JSON for programs, in which a formula is a string."""
    found = commands()
    assert {"dead list", "webhooks list", "status", "stats"} <= found.keys()
    for command in found.values():
        options = {option for param in command.params for option in (*param.opts, param.name)}
        assert not {option for option in options if re.search("csv|tsv|format|export", option)}
        assert "csv" not in (command.help or "").lower()
    a_dead_job(cli, error=FORMULA, prompt=FORMULA)
    [letter] = cli.run_json("dead", "list")
    assert (letter["event"]["data"]["error"], letter["request"]["prompt"]) == (FORMULA, FORMULA)


@pytest.mark.parametrize(
    "job_id",
    [
        pytest.param("../../etc/passwd", id="up"),
        pytest.param("%2e%2e%2fjob-1", id="percent"),
        pytest.param("..\\job-1", id="backslash"),
        pytest.param("*", id="star"),
        pytest.param("job-1\n", id="newline"),
        pytest.param("x" * 65, id="long"),
    ],
)
def test_an_id_that_is_a_path_names_nothing(cli: Cli, job_id: str) -> None:
    """Guards the pattern of job ids in the client, `is_stream_id`, and `publish`'s own check of the request."""
    publish(cli, "job-1")
    start(cli)
    before = dumped(cli)
    tried: list[tuple[str, ...]] = [
        ("status", job_id),
        ("cancel", job_id),
        ("wait", job_id, "--timeout", "1"),
        ("publish", "a fox", "--job-id", job_id),
        ("dead", "show", job_id),
        ("dead", "drop", job_id),
        ("dead", "replay", job_id),
        ("webhooks", "show", job_id),
        ("webhooks", "retry", job_id),
    ]
    for words in tried:
        cli.run(*words)
        assert cli.status == 2, (words, cli.out, cli.err)
        assert is_harmless(cli.err)
    assert dumped(cli) == before


@pytest.mark.parametrize("limit", ["-1", "0", "1000000000", "9" * 30, "1e9", ""])
def test_a_limit_that_is_none_is_bad_usage(cli: Cli, limit: str) -> None:
    """Guards `min` and `max` of both `Limit`s: 30 digits are more than `islice` and SQL can count."""
    a_dead_job(cli)
    before = dumped(cli)
    for words in ("dead list", "webhooks list", "dead replay --all", "dead drop --yes --all"):
        cli.run(*words.split(), "--limit", limit)
        assert cli.status == 2, words
    assert dumped(cli) == before


def test_the_largest_limit_is_every_letter(cli: Cli) -> None:
    a_dead_job(cli)
    assert len(cli.run_json("dead", "list", "--limit", "1000000")) == 1
    assert cli.run_json("webhooks", "list", "--limit", "1000000") == []


def test_a_second_replay_finds_nothing_and_changes_nothing(cli: Cli) -> None:
    """Guards the removal of the letter in the same script as the submission."""
    entry_id = a_dead_job(cli)
    assert [letter["verdict"] for letter in replayed(cli, entry_id)] == ["replayed"]
    before = dumped(cli)
    for _ in range(2):
        assert [letter["verdict"] for letter in replayed(cli, entry_id)] == ["gone"]
        assert cli.status == 2
    assert replayed(cli, "--all") == []
    assert (cli.status, dumped(cli)) == (0, before)


@pytest.mark.parametrize("entry_id", ["1-1", "0-0", "18446744073709551615-18446744073709551615"])
def test_a_replay_of_the_unknown_changes_nothing(cli: Cli, entry_id: str) -> None:
    a_dead_job(cli)
    before = dumped(cli)
    assert [letter["verdict"] for letter in replayed(cli, entry_id)] == ["gone"]
    assert (cli.status, dumped(cli)) == (2, before)


def test_a_replay_of_a_job_that_has_succeeded_since_makes_no_run(cli: Cli) -> None:
    """Guards `Replayer._superseded`: the letter of a run that was followed by another goes, and nothing else."""
    publish(cli, "job-1")
    fail(cli, run=1)
    [letter] = cli.run_json("dead", "list")
    as_it_was = letters(cli)[letter["entry_id"]]
    replayed(cli, letter["entry_id"])
    succeed(cli, run=2)
    bury(cli, as_it_was)  # as a replay leaves it that was cut off before it knew
    before = dumped(cli)
    [result] = replayed(cli, "--all")
    assert (cli.status, result["verdict"], result["run"]) == (0, "already", 2)
    after = dumped(cli)
    dead = cli.keys.dead.encode()
    assert {name for name in before if before[name] != after.get(name)} <= {dead}
    assert cli.run_json("dead", "list") == []
    assert cli.run_json("status", "job-1")["state"] == "succeeded"


def test_poison_that_is_replayed_again_makes_one_run_each_time(cli: Cli) -> None:
    entry_id = a_dead_job(cli)
    for run in (2, 3):
        assert [(one["verdict"], one["run"]) for one in replayed(cli, entry_id)] == [("replayed", run)]
        fail(cli, run)
        [letter] = cli.run_json("dead", "list")
        assert (letter["run"], letter["entry_id"] != entry_id) == (run, True)
        entry_id = letter["entry_id"]


def test_thousands_are_replayed_once_each(cli: Cli) -> None:
    """Guards `find`, which pages: all are chosen before the first goes, and none twice."""
    cli.consume(lambda ann: letter_kit.many_dead_jobs(ann.redis, ann.keys, 2000))
    summary = json.loads(cli.run("dead", "replay", "--all", "--json").splitlines()[-1])["summary"]
    assert (cli.status, summary["verdicts"], summary["not_reached"]) == (0, {"replayed": 2000}, 0)
    expected = [(f"job-{number}", "2") for number in range(2000)]
    assert cli.consume(lambda ann: letter_kit.runs(ann.redis, ann.keys)) == expected
    before = dumped(cli)
    assert replayed(cli, "--all") == []
    assert dumped(cli) == before


def test_a_dry_run_writes_nothing(cli: Cli) -> None:
    """Guards `dry_run` in `Replayer` and in `drop_letters`, for letters of every verdict."""
    fresh = a_dead_job(cli, "job-1")
    refused = a_dead_job(cli, "job-2", "--lora-url", "https://files.example/a.safetensors?sig=1")
    unreadable = bury(cli, {"raw": b"\xff"})
    superseded = a_dead_job(cli, "job-3")
    as_it_was = letters(cli)[superseded]
    replayed(cli, superseded)
    again = bury(cli, as_it_was)
    before = dumped(cli)
    found = replayed(cli, fresh, refused, unreadable, again, "1-1", "--dry-run")
    verdicts = ["would_replay", "refused", "undecodable", "already", "gone"]
    assert [letter["verdict"] for letter in found] == verdicts
    assert len(replayed(cli, "--all", "--dry-run", "--lora-url", "https://files.example/b?sig=2")) == 4
    assert cli.run_json("dead", "drop", "--all", "--dry-run") == {"would_drop": 4}
    assert cli.run_json("dead", "drop", fresh, "--dry-run") == {"would_drop": 1}
    assert dumped(cli) == before


PAYLOAD = b'{"job_id":"job-1","prompt":"a fox"}'
JOB: Letter = {"job_id": "job-1", "run": "1", "payload": PAYLOAD, "died_at": "1767323045000"}
UNDECODABLE: dict[str, Letter] = {
    "nothing that is known": {"x": "y"},
    "raw bytes": {"raw": b"\xff\xfe\x00\x1b[31m", "source": "s", "died_at": "1000"},
    "a payload that is not UTF-8": {**JOB, "payload": b"\xff"},
    "a payload of deep JSON": {**JOB, "payload": b"[" * 5000 + b"]" * 5000},
    "a payload of another version": {**JOB, "payload": b'{"v":2,"job_id":"job-1","prompt":"a"}'},
    "a payload of a mebibyte": {**JOB, "payload": b"x" * 2**20},
    "an empty payload": {**JOB, "payload": b""},
    "no run": {name: value for name, value in JOB.items() if name != "run"},
    "a run that is no number": {**JOB, "run": "first"},
    "a run in other digits": {**JOB, "run": "١"},
    "a run of 400 digits": {**JOB, "run": "9" * 400},
    "a negative run": {**JOB, "run": "-1"},
    "a job id that is a path": {**JOB, "job_id": "../x", "payload": b"{}"},
    "a time beyond the calendar": {"raw": b"x", "died_at": "9" * 16},
    "a time of 5000 digits": {"raw": b"x", "died_at": "9" * 5000},
    "a time that is no number": {"raw": b"x", "died_at": "soon\x1b[31m"},
    "a source that acts": {"raw": b"x", "source": "\x1b[31m", "attempts": "\x07"},
    "an event that is none": {"raw": b"x", "event": b'{"type":"generation.failed"}'},
    "an event that is not UTF-8": {"raw": b"x", "event": b"\xff"},
    "a field that is not UTF-8": {b"\xff\xfe": b"x"},
}


def test_letters_that_cannot_be_decoded_are_shown_and_kept(cli: Cli) -> None:
    """Guards `decode_dead_letter`, which reads whatever is in it, and `Verdict.UNDECODABLE`."""
    buried = {bury(cli, letter): kind for kind, letter in UNDECODABLE.items()}
    good = a_dead_job(cli, "job-9")
    assert is_harmless(cli.run("dead", "list"))
    assert cli.run("dead", "list", "--json").isascii()
    for entry_id, kind in buried.items():
        assert is_harmless(cli.run("dead", "show", entry_id)), kind
        assert cli.run_json("dead", "show", entry_id)["entry_id"] == entry_id, kind
    before = dumped(cli)
    found = replayed(cli, *buried)
    assert [buried[letter["entry_id"]] for letter in found if letter["verdict"] == "undecodable"] == [*UNDECODABLE]
    assert (cli.status, dumped(cli)) == (1, before)
    assert [letter["entry_id"] for letter in replayed(cli, "--all") if letter["verdict"] == "replayed"] == [good]
    assert cli.run_json("dead", "drop", *buried, good) == {"dropped": len(buried)}
    assert cli.run_json("dead", "list") == []
