"""What the page on dead letters shows is so: its commands run, and so does its script."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from producer.dead_letters import Verdict
from schemas.errors import ErrorCode
from tests.docs_kit import DOCS
from tests.event_kit import failed
from tests.integration.cli_kit import Cli
from tests.integration.client_kit import FOREIGN_URL, Ender
from tests.integration.letter_kit import die, runs
from tests.integration.queue_kit import a_request

PAGE = (DOCS / "dead-letters.md").read_text()
ENTRY_ID = "1767323045678-0"
COMMANDS = re.findall(r"^python -m producer (.*?)(?:\s+#.*)?$", PAGE, re.MULTILINE)


async def put_a_letter(ann: Ender) -> None:
    await ann.redis.xadd(
        ann.keys.dead,
        {"job_id": "job-1", "run": "1", "payload": a_request().encode(), "event": failed().encode()},
        id=ENTRY_ID,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs_as_it_is_written(cli: Cli, command: str) -> None:
    cli.consume(put_a_letter)
    cli.run(*shlex.split(command.replace("$URL", f"{FOREIGN_URL}?sig=fresh")))
    assert (cli.status, cli.err) == (0, "")
    assert cli.out


def test_the_script_replays_what_it_describes_and_tells_of_the_rest(cli: Cli) -> None:
    jobs = {"job-1": ErrorCode.TIMEOUT, "job-2": ErrorCode.INTERNAL, "job-3": ErrorCode.CUDA_OOM}
    for job_id in jobs:
        cli.run("publish", "a fox", "--job-id", job_id, *(["--lora-url", FOREIGN_URL] if job_id == "job-3" else []))

    async def let_them_die(ann: Ender) -> None:
        for code in jobs.values():
            await die(ann, code)

    cli.consume(let_them_die)
    [script] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    environment = {**os.environ, **cli.environment}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("job-3 refused lora_url has lost its signature")
    assert cli.consume(lambda ann: runs(ann.redis, ann.keys)) == [("job-1", "2")]


def test_the_page_has_every_verdict_and_every_filter(cli: Cli) -> None:
    assert set(Verdict) <= set(re.findall(r"`(\w+)`", PAGE))
    options = set(re.findall(r"--[\w-]+", cli.run("dead", "list", "--help", TERMINAL_WIDTH="200")))
    table = PAGE.split("## Look")[1].split("## ")[0]
    assert options - {"--json", "--help"} <= set(re.findall(r"--[\w-]+", table))
