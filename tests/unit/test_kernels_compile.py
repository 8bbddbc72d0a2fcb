"""Triton's compiler takes every kernel, for GPUs that are not there: its interpreter would run what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KIB = 1024
EVERYWHERE = {"attend_text", "euler", "moments", "normaliser", "normalise", "layer_norm", "_patch_tile"}


@pytest.mark.parametrize(
    ("capability", "feed_forward", "shared_kib"),
    [(80, "gate", 99), (90, "geglu", 227), (100, "geglu", 227)],
    ids=["A100 and desktops", "H200", "B200"],
)
def test_all_kernels_are_compiled_and_fit_into_shared_memory(
    tiny_model: Path, capability: int, feed_forward: str, shared_kib: int
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # a default of Triton's that is about to change must not be relied on
    command = [sys.executable, "-W", "error:TRITON_DEFAULT_FP_FUSION", "-m", "tests.absent_gpu", str(tiny_model)]
    output = subprocess.run(
        [*command, str(capability)], env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    compiled = [json.loads(line) for line in output.splitlines()]
    assert {one["kernel"] for one in compiled} == EVERYWHERE | {feed_forward}
    assert max(one["shared"] for one in compiled) <= shared_kib * KIB
    if capability == 90:  # one product of values and gates, as wide as the tensor cores take it
        assert ["m64n256k16" in one["ptx"] for one in compiled if one["kernel"] == "geglu"] == [True]
