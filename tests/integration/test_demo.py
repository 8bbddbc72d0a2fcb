"""The demo from end to end, with real servers and a real consumer, and what remains when it is interrupted."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from demo import stack
from demo.run import run
from demo.servers import ServerFailed, redis_executable
from producer.database import open_engine
from producer.store import Store
from schemas.keys import JobState

ROOT = Path(__file__).parents[2]
# One of each kind: a LoRA by URL and one by key, a caller's own upload URL, and both refusals.
JOBS = {
    "lighthouse-both": JobState.SUCCEEDED,
    "mountains-upload-url": JobState.SUCCEEDED,
    "dead-link": JobState.FAILED,
    "too-many-steps": JobState.FAILED,
}
PROGRAM = "import sys, pathlib, demo.__main__ as demo; sys.exit(demo.main(pathlib.Path(sys.argv[1])))"


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the processes that draw: two wait for each other when a core is taken."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _redis_is_installed() -> None:
    try:
        redis_executable()
    except ServerFailed as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


def test_the_demo_goes_as_planned(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, gallery = tmp_path / "out", tmp_path / "gallery.html"
    status = run(out, gallery, only=JOBS)
    printed = capfd.readouterr()
    assert (status, printed.err) == (0, ""), printed
    assert re.search(r"\n4 jobs: 2 pictures, 2 refused as planned; [\d.]+ s; open .*gallery\.html\n\Z", printed.out)
    assert "\x1b" not in printed.out

    page = gallery.read_text()
    assert re.findall(r'<article class="card" id="([^"]+)"', page) == list(JOBS)
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"https?://[^\s\"<]*\?", page)

    engine = open_engine(f"sqlite:///{out / 'listener.db'}")
    store = Store(engine)
    stored = {job_id: store.job(job_id) for job_id in JOBS}
    engine.dispose()
    assert {job_id: job.state for job_id, job in stored.items() if job} == JOBS


def test_ctrl_c_leaves_no_process_behind(tmp_path: Path) -> None:
    demo = start(tmp_path)
    try:
        assert demo.stdout is not None
        assert demo.stdout.readline().startswith("Redis ")
        assert len(processes_of(demo.pid)) > 1
        demo.send_signal(signal.SIGINT)
        demo.send_signal(signal.SIGINT)
        _, errors = demo.communicate(timeout=120)  # servers are seen through their start before the stop is heeded
    finally:
        demo.kill()
    assert (demo.returncode, errors) == (128 + signal.SIGINT, "")
    assert processes_of(demo.pid) == set()


def test_a_consumer_that_dies_ends_the_demo_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    environment = stack._environment
    monkeypatch.setattr(stack, "_environment", lambda *of: {**environment(*of), "SDXL_LEASE_SECONDS": "long"})
    monkeypatch.setattr(stack, "_wait_for_materials", lambda *_: None)  # nothing is drawn
    assert run(tmp_path / "out", tmp_path / "gallery.html") == 1
    printed = capfd.readouterr()
    assert "the consumer ended with status 2" in printed.err
    assert "settings.invalid" in printed.err
    assert not (tmp_path / "gallery.html").exists()


def start(folder: Path) -> subprocess.Popen[str]:
    """The demo as a program in a session of its own, by which its processes can be told from others."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def processes_of(session: int) -> set[int]:
    found = set()
    for pid in psutil.pids():
        with suppress(ProcessLookupError):
            if os.getsid(pid) == session:
                found.add(pid)
    return found
