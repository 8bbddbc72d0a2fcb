"""An engine on a GPU that is not the first: every thread begins with the first as its current one."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from consumer.engine import OnStep, PreparedLoras
from consumer.engine.painting import PaintingEngine
from schemas.requests import GenerationRequest

SECOND = torch.device("cuda:1")


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that were made the current one and still are."""
    inside: list[torch.device] = []

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        inside.append(chosen)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    return inside


def test_everything_is_launched_on_the_engines_own_gpu(current: list[torch.device], monkeypatch: Any) -> None:
    """Guards `PaintingEngine`: Triton, graphs and streams go by the current device, whatever tensors they are of."""
    seen: dict[str, list[torch.device]] = {}

    def note(name: str) -> Any:
        def called(*_: Any, **__: Any) -> Any:
            seen[name] = list(current)
            return 0

        return called

    monkeypatch.setattr("consumer.engine.painting.prepare", note("prepare"))
    weights = SimpleNamespace(restore=note("restore"), sample=note("sample"), check=note("check"))
    marks = SimpleNamespace(begin=note("begin"), set=note("set"))
    painter: Any = SimpleNamespace(device=SECOND, shapes=None, weights=weights, marks=marks, sampler="Euler")
    painter.warm_up, painter.cut_prompts = note("warm_up"), lambda request: []

    def draw(request: GenerationRequest, on_step: OnStep) -> Any:
        on_step(request.steps, request.steps)
        return note("draw")()

    painter.draw = draw
    engine = PaintingEngine(painter)
    engine.prepare([])
    engine.warm_up()
    engine.generate(GenerationRequest(job_id="job-1", prompt="x"), PreparedLoras(), lambda step, total: None)
    assert seen.keys() == {"prepare", "warm_up", "begin", "set", "restore", "draw", "sample", "check"}
    assert set(map(tuple, seen.values())) == {(SECOND,)}
    assert current == []
