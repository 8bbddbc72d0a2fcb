"""What a consumer writes to standard error, as a process."""

import json
import subprocess
import sys

PROGRAM = """
import logging, structlog
from consumer import logs
logs.configure()
log = structlog.get_logger("consumer.test")
structlog.contextvars.bind_contextvars(job_id="job-1")
log.info("told", url="https://h/x?X-Amz-Signature=c4n4ry", deep={"urls": ["https://u:c4n4ry@h/y"]})
try:
    raise ValueError("https://h/x?sig=c4n4ry")
except ValueError:
    log.exception("failed")
logging.getLogger("botocore").warning("GET https://h/x?X-Amz-Credential=c4n4ry")
raise RuntimeError("https://h/x?token=c4n4ry")
"""


def test_logs_are_json_lines_that_carry_the_job_and_no_signature() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "c4n4ry" not in done.stderr
    records = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert [record["event"] for record in records[:2]] == ["told", "failed"]
    assert records[0]["url"] == "https://h/x"
    assert records[0]["deep"] == {"urls": ["https://h/y"]}
    assert all(record["job_id"] == "job-1" for record in records[:2])
    assert "ValueError: https://h/x" in records[1]["exception"]
    assert records[2]["event"] == "GET https://h/x"
    assert "RuntimeError: https://h/x" in done.stderr
