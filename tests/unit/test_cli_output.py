"""What the commands print cannot act on a terminal, and their errors tell no secrets."""

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from botocore.exceptions import EndpointConnectionError
from redis.exceptions import ConnectionError as RedisConnectionError
from rich.text import Text
from sqlalchemy.exc import OperationalError

from producer.cli import output
from producer.cli.command import BadUsage, Status, error_document, explain, parse_json, status_of, tell
from producer.errors import JobConflict, JobFailed, JobUnknown, QueueFull, RequestRefused, WaitTimeout
from schemas.errors import ErrorCode


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a red fox, ein Fuchs, 狐, 🦊", "a red fox, ein Fuchs, 狐, 🦊"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x9b31m", r"\x9b31m"),
        ("a\r\nb\t\0", r"a\r\nb\t\x00"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\u200b\ufeff\u2028", r"\u200b\ufeff\u2028"),
        ("\ud800", r"\ud800"),
        ("[red]:smile:", "[red]:smile:"),
        (7, "7"),
    ],
)
def test_letters_are_shown_and_what_acts_is_written_out(text: object, shown: str) -> None:
    assert output.visible(text) == shown


def test_tables_take_markup_for_text_and_lose_nothing_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 300
    output.stdout().print(output.table(("name", "error"), [("[bold]a[/bold]", "\x1b[31m"), (long, ":smile:")]))
    output.stdout().print(output.facts_grid({"[b]": "[i]", "none": None, "long": long, "styled": Text("t", "red")}))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["[bold]a[/bold]", r"\x1b[31m"]
    assert lines[2].split() == [long, ":smile:"]
    assert [line.split() for line in lines[3:]] == [["[b]", "[i]"], ["long", long], ["styled", "t"]]


def test_json_is_one_line_of_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    document = {"prompt": "狐 \x9b31m\u202e\n", "n": [1, None]}
    output.print_json(document)
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert printed.count("\n") == 1
    assert json.loads(printed) == document


def test_times_are_shown_in_utc() -> None:
    time = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=timezone(timedelta(hours=2)))
    assert output.time_text(time) == "2026-01-02 01:04:05Z"
    assert output.time_text(None) == ""
    assert output.time_text(datetime(2026, 1, 2, tzinfo=UTC)) == "2026-01-02 00:00:00Z"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestRefused("x"), Status.USAGE),
        (JobUnknown("x"), Status.USAGE),
        (BadUsage("x"), Status.USAGE),
        (JobConflict("x"), Status.FAILED),
        (QueueFull("x"), Status.FAILED),
        (JobFailed("x"), Status.FAILED),
        (WaitTimeout("x"), Status.FAILED),
        (RedisConnectionError("x"), Status.UNREACHABLE),
        (EndpointConnectionError(endpoint_url="https://x"), Status.UNREACHABLE),
        (OperationalError("x", {}, Exception()), Status.UNREACHABLE),
        (None, Status.OK),
    ],
)
def test_every_error_has_its_exit_status(error: Exception | None, status: Status) -> None:
    assert status_of(error) == status


def test_the_exit_statuses_are_those_of_the_contract() -> None:
    assert [int(status) for status in Status] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "error",
    [
        RedisConnectionError("Error connecting to redis://user:canary@host:1/0"),
        EndpointConnectionError(endpoint_url="https://s3.example/b/k?X-Amz-Signature=canary"),
        OperationalError("INSERT canary", {"p": "canary"}, Exception("canary")),
        JobFailed("GET https://s3.example/b/k?X-Amz-Signature=canary failed"),
    ],
)
def test_an_error_is_one_line_without_secrets(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert "\n" not in explain(error)
    tell(error, as_json=False)
    tell(error, as_json=True)
    printed = capsys.readouterr()
    assert "canary" not in printed.out + printed.err
    assert printed.err.startswith("error: ")
    assert len(printed.err.splitlines()) == 1
    assert json.loads(printed.out)["error"]["kind"] == type(error).__name__


def test_a_program_gets_all_that_is_known_of_an_error() -> None:
    error = JobFailed("no", job_id="job-1", error_code=ErrorCode.TIMEOUT, retry_after=0, details={"steps": 3})
    assert error_document(error) == {
        "job_id": "job-1",
        "error": {
            "kind": "JobFailed",
            "message": "no",
            "error_code": "TIMEOUT",
            "retry_after": 0,
            "details": {"steps": 3},
        },
    }


@pytest.mark.parametrize("text", ["{", "NaN", '{"a":1,"a":2}', "\udcff"])
def test_json_in_an_option_is_as_strict_as_on_the_wire(text: str) -> None:
    with pytest.raises(BadUsage, match="--metadata"):
        parse_json(text, "--metadata")
    assert parse_json('{"a": [1]}', "--metadata") == {"a": [1]}
