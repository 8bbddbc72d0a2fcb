"""Which engine a consumer loads, and what it imports for it."""

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from consumer.bootstrap import load_engine
from consumer.engine import common
from consumer.engine.fast.fields import UnknownModel
from consumer.errors import GenerationFailed, ModelBroken
from consumer.settings import ConsumerSettings
from demo import loras
from schemas.requests import GenerationRequest


class Loaded:
    """An engine that remembers how it was loaded."""

    gpu = "none"

    def __init__(self, base_model: str, options: dict[str, Any]) -> None:
        self.base_model = base_model
        self.options = options
        self.warm = False

    def warm_up(self) -> None:
        self.warm = True


@pytest.fixture(autouse=True)
def python_as_it_was() -> Iterator[None]:
    interval = sys.getswitchinterval()
    yield
    sys.setswitchinterval(interval)
    gc.unfreeze()


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> dict[str, Exception | None]:
    """Both engines stand in; what is put in here under their names they raise when they are loaded."""
    failures: dict[str, Exception | None] = {"fast": None, "stock": None}
    for name, attribute in (("fast.engine", "FastEngine"), ("stock", "StockEngine")):
        kind = name.split(".")[0]

        def load(model: str, kind: str = kind, **options: Any) -> Loaded:
            failure = failures[kind]
            if failure is not None:
                raise failure
            return Loaded(f"{kind}:{model}", options)

        module = ModuleType(f"consumer.engine.{name}")
        setattr(module, attribute, type(attribute, (), {"load": staticmethod(load)}))
        monkeypatch.setitem(sys.modules, f"consumer.engine.{name}", module)
    return failures


def settings(**values: Any) -> ConsumerSettings:
    return ConsumerSettings(model="m", **values)


def test_the_fast_engine_is_chosen_where_it_can_be_and_told_everything(engines: dict[str, Exception | None]) -> None:
    options = {"vae": "v", "hub_token": "hf_x", "dtype": "bfloat16"}
    with capture_logs() as logs:
        engine: Any = load_engine(settings(**options))
    assert engine.base_model == "fast:m"
    assert engine.warm
    assert engine.options == {"vae": "v", "device": "cuda", "dtype": "bfloat16", "hub_token": "hf_x"}
    assert {"event": "engine.chosen", "engine": "fast", "log_level": "info"} in logs


def test_threads_do_not_hold_each_other_up(engines: dict[str, Exception | None]) -> None:
    """Guards `_share_python`."""
    load_engine(settings())
    assert sys.getswitchinterval() == pytest.approx(0.0005)
    assert gc.get_freeze_count() > 1000


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"device": "cpu", "dtype": "bfloat16"}, "SDXL_DEVICE is cpu"),
        ({"dtype": "float32"}, "SDXL_DTYPE is float32"),
        ({"speed": "stock"}, "SDXL_SPEED is stock"),
        ({}, "unet: act_fn is 'gelu'"),
    ],
    ids=["cpu", "float32", "asked for", "unknown model"],
)
def test_elsewhere_it_is_the_stock_engine_and_the_reason_is_logged(
    engines: dict[str, Exception | None], values: dict[str, Any], reason: str
) -> None:
    """Guards `_choose_engine` and `_reason_for_stock`."""
    engines["fast"] = UnknownModel("unet: act_fn is 'gelu'")
    with capture_logs() as logs:
        assert load_engine(settings(**values)).base_model == "stock:m"
    assert [(log["engine"], log["reason"]) for log in logs if log["event"] == "engine.chosen"] == [("stock", reason)]


def test_the_fast_engine_alone_may_be_asked_for_anywhere(engines: dict[str, Exception | None]) -> None:
    values = {"speed": "fast", "device": "cpu", "dtype": "float32"}
    assert load_engine(settings(**values)).base_model == "fast:m"
    engines["fast"] = UnknownModel("unet: act_fn is 'gelu'")
    with pytest.raises(ModelBroken, match="act_fn is 'gelu'"):
        load_engine(settings(**values))


def test_a_model_that_cannot_be_loaded_is_not_tried_twice(engines: dict[str, Exception | None]) -> None:
    engines["fast"] = ModelBroken("no such folder")
    with pytest.raises(ModelBroken, match="no such folder"):
        load_engine(settings())


def test_another_speed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ConsumerSettings().speed == "auto"
    monkeypatch.setenv("SDXL_SPEED", "faster")
    with pytest.raises(ValidationError):
        ConsumerSettings()


def run(program: str, *arguments: Path) -> str:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def test_a_consumer_starts_without_the_libraries_that_draw() -> None:
    """What is slow to import is imported by the engine that needs it, and not before the settings are read."""
    program = "import sys, consumer.__main__; print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    assert run(program) == "set()\n"


def test_the_fast_engine_needs_neither_diffusers_nor_transformers(tiny_model: Path, tmp_path: Path) -> None:
    """From the folder and a LoRA's file into the first steps of a picture."""
    modules = loras.attention_modules(loras.shapes_of(tiny_model), text_encoders=True)
    lora = loras.write_peft(tmp_path / "ink.safetensors", modules, seed=1, strength=0.5)
    program = """
import sys, torch
from pathlib import Path
from consumer.engine import LoraFile
from consumer.engine.fast.engine import FastEngine
from schemas.requests import GenerationRequest, LoraRef
torch.set_num_threads(1)
engine = FastEngine.load(sys.argv[1], device="cpu", dtype="float32")
loras = engine.prepare([LoraFile(Path(sys.argv[2]), LoraRef(key="loras/ink.safetensors"))])
request = GenerationRequest(job_id="j", prompt="a red flower", width=512, height=512, steps=20)
def stop(step, total):
    raise InterruptedError(f"{step}/{total}")
try:
    engine.generate(request, loras, stop)
except InterruptedError as error:
    print(error)
print({"diffusers", "transformers", "peft", "accelerate", "huggingface_hub"} & set(sys.modules))
"""
    assert run(program, tiny_model, lora) == "1/20\nset()\n"


def test_black_and_nan_pictures_are_failed_generations() -> None:
    common.refuse_nan(True)
    with pytest.raises(GenerationFailed, match="NaN"):
        common.refuse_nan(False)
    pixels = np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(GenerationFailed, match="black"):
        common.refuse_black(pixels)
    pixels[0, 0, 0] = 1
    common.refuse_black(pixels)


def test_each_cut_prompt_is_told_once_with_the_first_tokenizer_that_cuts_it() -> None:
    request = GenerationRequest(job_id="j", prompt="four", negative_prompt="sevenfold")
    warnings = common.cut_prompts(request, [(len, 5), (lambda text: 2 * len(text), 6)])
    assert warnings == ["prompt has 8 tokens and was cut at 6", "negative_prompt has 9 tokens and was cut at 5"]
    assert common.cut_prompts(request, [(len, 9)]) == []
