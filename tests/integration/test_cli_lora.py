"""`lora check` from a shell: what it prints, its exit status, and objects of the own bucket."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from demo.servers import S3Server
from tests.integration.cli_kit import Cli
from tests.lora_bytes import framed, with_tensors

if TYPE_CHECKING:
    from types_boto3_s3.client import S3Client

BUCKET = "loras-to-check"
TO_Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def a_lora(module: str = TO_Q) -> bytes:
    """Rank 1 for a weight of [640, 640], in zeros."""
    down = {"dtype": "F16", "shape": [1, 640], "data_offsets": [0, 1280]}
    up = {"dtype": "F16", "shape": [640, 1], "data_offsets": [1280, 2560]}
    return with_tensors({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, 2560)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "ann.safetensors"
    path.write_bytes(a_lora())
    return path


@pytest.fixture(scope="module")
def s3(s3_at: S3Server) -> Iterator["S3Client"]:
    s3_at.create_bucket(BUCKET)
    client = s3_at.client()
    yield client
    client.close()


@pytest.fixture
def storing(cli: Cli, s3_at: S3Server) -> Cli:
    cli.environment |= {
        "R2_ENDPOINT_URL": s3_at.url,
        "R2_BUCKET_NAME": BUCKET,
        "R2_ACCESS_KEY_ID": "canary-access-key",
        "R2_SECRET_ACCESS_KEY": "canary-secret-key",
    }
    return cli


def test_a_file_that_fits_ends_with_status_0(cli: Cli, path: Path) -> None:
    cli.run("lora", "check", str(path))
    assert (cli.status, cli.err) == (0, "")
    facts = dict(line.split(maxsplit=1) for line in cli.out.splitlines())
    assert facts["verdict"].strip() == "fits SDXL"
    assert facts["modules"].strip() == "1 in unet"
    assert facts["sha256"].strip() == hashlib.sha256(a_lora()).hexdigest()


def test_its_document_has_all_that_a_backend_registers(cli: Cli, path: Path) -> None:
    document = cli.run_json("lora", "check", str(path))
    assert document == {
        "file": str(path),
        "fits": True,
        "error_code": None,
        "error": None,
        "details": {},
        "kinds": ["LoRA"],
        "naming": ["diffusers"],
        "modules": {"unet": 1},
        "skipped": [],
        "ranks": [1],
        "alphas": [1.0],
        "dtypes": ["F16"],
        "size_bytes": len(a_lora()),
        "sha256": hashlib.sha256(a_lora()).hexdigest(),
        "metadata": {},
    }


def test_a_file_that_does_not_fit_ends_with_status_1_and_the_events_code_and_reason(cli: Cli, path: Path) -> None:
    path.write_bytes(a_lora("unet.conv_in"))
    document = cli.run_json("lora", "check", str(path))
    assert cli.status == 1
    assert (document["fits"], document["error_code"]) == (False, "LORA_LOAD_FAILED")
    assert document["error"].startswith("The LoRA does not fit the model: unet.conv_in is [320, 4, 3, 3]")
    assert document["details"]["file_shape"] == [640, 640]
    cli.run("lora", "check", str(path))
    assert cli.status == 1
    assert "LORA_LOAD_FAILED" in cli.out
    assert document["error"] in cli.out


def test_what_matches_nothing_is_counted_and_named(cli: Cli, path: Path) -> None:
    entries = {
        f"unet.{module}.lora_{half}.weight": {"dtype": "F16", "shape": shape, "data_offsets": [start, start + 1280]}
        for module, first in ((TO_Q.removeprefix("unet."), 0), ("extra", 2560))
        for half, shape, start in (("A", [1, 640], first), ("B", [640, 1], first + 1280))
    }
    path.write_bytes(with_tensors(entries, 5120))
    assert "2 tensors match nothing in SDXL: unet.extra.lora_A.weight" in cli.run("lora", "check", str(path))
    assert cli.status == 0


def test_a_strangers_metadata_do_not_act_on_the_terminal(cli: Cli, path: Path) -> None:
    raw = a_lora()[8:].replace(b"{", b'{"__metadata__":{"modelspec.title":"\\u001b[2J[red]x[/red]"},', 1)
    path.write_bytes(framed(raw[:-2560], raw[-2560:]))
    assert "\\x1b[2J[red]x[/red]" in cli.run("lora", "check", str(path))


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_no_such_file_ends_with_status_2(cli: Cli, name: str) -> None:
    assert cli.run("lora", "check", name) == ""
    assert (cli.status, cli.err) == (2, f"error: there is no file {name}\n")


def test_it_needs_no_torch(path: Path) -> None:
    script = (
        "import sys; from producer.cli.app import app\n"
        f"try: app(['lora', 'check', {str(path)!r}])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'safetensors', 'numpy'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_object_of_the_own_bucket_is_checked_by_its_key(storing: Cli, s3: "S3Client") -> None:
    s3.put_object(Bucket=BUCKET, Key="loras/ann.safetensors", Body=a_lora())
    document = storing.run_json("lora", "check", "--key", "loras/ann.safetensors")
    assert storing.status == 0
    assert (document["file"], document["fits"]) == ("loras/ann.safetensors", True)
    assert document["sha256"] == hashlib.sha256(a_lora()).hexdigest()


def test_a_key_that_names_no_object_ends_with_status_2(storing: Cli, s3: "S3Client") -> None:
    storing.run("lora", "check", "--key", "loras/nobody.safetensors")
    assert (storing.status, storing.err) == (2, "error: there is no object loras/nobody.safetensors\n")


def test_a_key_without_a_storage_ends_with_status_2(cli: Cli) -> None:
    cli.run("lora", "check", "--key", "loras/ann.safetensors")
    assert cli.status == 2
    assert "R2_BUCKET_NAME" in cli.err


def test_a_storage_out_of_reach_ends_with_status_3_and_tells_no_secret(storing: Cli) -> None:
    storing.run("lora", "check", "--key", "loras/ann.safetensors", R2_ENDPOINT_URL="http://127.0.0.1:1")
    assert storing.status == 3
    assert "canary" not in storing.out + storing.err
