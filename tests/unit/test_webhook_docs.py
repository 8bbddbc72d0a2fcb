"""What docs/webhooks.md says is so."""

import re
import runpy
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from producer.cli.app import app
from producer.webhooks.delivery import DEADLINES, DELAYS_S, JITTER
from producer.webhooks.signing import read_secrets, signed_headers
from producer.webhooks.worker import SWEEP_EVERY_S
from tests import event_kit

PAGE = (Path(__file__).parents[2] / "docs/webhooks.md").read_text()


async def test_the_receivers_example_takes_an_event_once_and_refuses_a_forged_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    file = tmp_path / "receiver.py"
    file.write_text(code)
    names = runpy.run_path(str(file))
    body = event_kit.succeeded().encode()
    headers = signed_headers(read_secrets(names["SECRET"]), event_kit.succeeded().id, body, datetime.now(UTC))
    transport = httpx.ASGITransport(app=names["app"])
    async with httpx.AsyncClient(transport=transport, base_url="http://receiver") as client:
        answers = [await client.post("/hooks/sdxl", content=body, headers=headers) for _ in range(2)]
        forged = await client.post("/hooks/sdxl", content=body.replace(b"job-1", b"job-2"), headers=headers)
    assert [answer.status_code for answer in answers] == [204, 204]
    assert forged.status_code == 401
    assert capsys.readouterr().out == "generation.succeeded job-1\n"


def test_the_schedule_is_the_one_that_is_kept() -> None:
    rows = re.findall(r"^\| (\d+) \| (at once|\d+ (?:s|min|h)) \| (\d+):(\d\d):(\d\d) \|$", PAGE, re.MULTILINE)
    units = {"s": 1, "min": 60, "h": 3600}
    waits = [0 if wait == "at once" else int(wait.split()[0]) * units[wait.split()[1]] for _, wait, *_ in rows]
    assert [int(number) for number, *_ in rows] == list(range(1, len(DELAYS_S) + 2))
    assert tuple(waits[1:]) == DELAYS_S
    since = [timedelta(hours=int(hours), minutes=int(minutes), seconds=int(s)) for _, _, hours, minutes, s in rows]
    assert since == [timedelta(seconds=sum(waits[: number + 1])) for number in range(len(waits))]
    assert JITTER == 0.1


def test_the_figures_are_the_codes() -> None:
    assert f"within {DEADLINES.whole_s:.0f} seconds" in PAGE
    assert f"every {SWEEP_EVERY_S} seconds" in PAGE


@pytest.mark.parametrize("line", re.findall(r"^python -m producer (.*)$", PAGE, re.MULTILINE))
def test_every_command_it_names_exists_with_its_options(line: str) -> None:
    words = re.findall(r'"[^"]*"|\S+', line.partition("#")[0])
    options = [word for word in words if word.startswith("--")]
    command = [word for word in words if re.fullmatch("[a-z]+", word)][: 2 if words[0] == "webhooks" else 1]
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert all(option in result.stdout for option in options)
