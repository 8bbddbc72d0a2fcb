"""Secrets: in settings, in what the interpreter writes by itself, and in what is installed."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from pydantic import SecretStr
from pydantic_settings import BaseSettings

from consumer.settings import ConsumerSettings
from examples.backend.settings import BackendSettings
from producer.settings import ProducerSettings

ROOT = Path(__file__).parents[2]
SETTINGS = [ProducerSettings, ConsumerSettings, BackendSettings]
SECRET_NAME = re.compile(r"secret|token|password|access_key|redis_url|database_url", re.IGNORECASE)
# What is not a distribution of the application: the tools that make an environment.
TOOLS = {"pip", "setuptools", "wheel", "modal-sdxl-lora"}
TORCHS_OWN = {"triton"}  # where torch is built for CUDA, it names the version itself


def names(settings: type[BaseSettings], field: str) -> list[str]:
    """The variables of a field, and its own name."""
    info = settings.model_fields[field]
    choices = getattr(info.validation_alias, "choices", [info.validation_alias])
    return [field, *map(str, choices)]


def secrets_of(settings: type[BaseSettings]) -> list[str]:
    return [field for field in settings.model_fields if any(map(SECRET_NAME.search, names(settings, field)))]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: str(settings.__name__))
def test_every_setting_that_is_named_like_a_secret_is_one(settings: type[BaseSettings]) -> None:
    assert "redis_url" in secrets_of(settings)
    for field in secrets_of(settings):
        annotation = settings.model_fields[field].annotation
        assert annotation in (SecretStr, SecretStr | None), field


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: str(settings.__name__))
def test_settings_show_no_secret_in_any_form(settings: type[BaseSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    for field in secrets_of(settings):
        value = "redis://:c4n4ry@h/0" if field == "redis_url" else "c4n4ry"
        monkeypatch.setenv(names(settings, field)[1], value)
    read = settings()
    assert all("c4n4ry" in getattr(read, field).get_secret_value() for field in secrets_of(settings))
    for shown in (repr(read), str(read), read.model_dump_json(), repr(read.model_dump()), repr(dict(read))):
        assert "c4n4ry" not in shown


ESCAPES = {
    "an exception that nobody caught": "raise RuntimeError(URL)",
    "one with a cause": "try:\n    fail(URL)\nexcept ValueError as error:\n    raise RuntimeError('x') from error",
    "one with a note": "error = RuntimeError('x')\nerror.add_note(URL)\nraise error",
    "a group": "raise ExceptionGroup('x', [ValueError(URL)])",
    "a thread": "t = threading.Thread(target=lambda: fail(URL))\nt.start()\nt.join()",
    "a finalizer": "class Broken:\n    def __del__(self): fail(URL)\nBroken()",
    "a warning": "warnings.warn(URL)",
    "a record of a library": "logging.getLogger('library').warning('GET %s', URL)",
    "a traceback of a library": "try:\n    fail(URL)\nexcept ValueError:\n    logging.getLogger('x').exception('no')",
    "a task that nobody awaited": (
        "async def main():\n    asyncio.create_task(failing())\n    await asyncio.sleep(0.01)\n    gc.collect()\n"
        "async def failing(): fail(URL)\nasyncio.run(main())"
    ),
    "a callback of the loop": (
        "async def main():\n    asyncio.get_running_loop().call_soon(fail, URL)\n    await asyncio.sleep(0.01)\n"
        "asyncio.run(main())"
    ),
}
SET_UP = {
    "consumer": "from consumer import logs\nlogs.configure()\n",
    "producer": "from producer.cli import app\napp._log_to_stderr()\n",
}
PRELUDE = """
import asyncio, gc, logging, os, sys, threading, warnings
URL = "https://h/object?X-Amz-Signature=c4n4ry"
def fail(text): raise ValueError(text)
gc.freeze()
"""


@pytest.mark.parametrize("side", SET_UP)
def test_what_escapes_every_except_is_written_without_secrets(side: str) -> None:
    """Guards `schemas.stderr.redact_stderr`, and the consumer's own handler: each line of it has its case here."""
    script = SET_UP[side] + PRELUDE
    for what, program in ESCAPES.items():  # each in a fork, since most end their process
        indented = program.replace("\n", "\n    ")
        script += f"print({what!r}, file=sys.stderr, flush=True)\n"
        script += f"if (pid := os.fork()) == 0:\n    {indented}\n    sys.stderr.flush()\n    os._exit(0)\n"
        script += "os.waitpid(pid, 0)\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for what, following in zip(ESCAPES, [*list(ESCAPES)[1:], None], strict=True):
        said = done.stderr.partition(what)[2].partition(following or "\0")[0]
        assert "https://h/ob" in said, what  # asyncio abbreviates what it was to call
        assert "c4n4ry" not in said, what


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().split()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^*=<>~]+", line) for line in lines)
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines)}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_installed_distribution_is_pinned_exactly() -> None:
    installed = {canonical(found.metadata["Name"]): found.version for found in metadata.distributions()}
    wanted = pins()
    assert {name for name in installed if name not in wanted} <= TOOLS | TORCHS_OWN
    differing = {
        name: version
        for name, version in installed.items()
        if name in wanted and version.partition("+")[0] != wanted[name]  # a local build, as torch has for each platform
    }
    assert differing == {}


def test_make_setup_installs_what_is_pinned() -> None:
    [install] = [line for line in (ROOT / "Makefile").read_text().splitlines() if "pip install" in line]
    assert "-c constraints.txt" in install
