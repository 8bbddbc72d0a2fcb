"""What `modal_app` registers, without a network and without an account."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import modal
import pytest
from fastapi.testclient import TestClient

ROOT = Path(__file__).parents[2]


class Registered:
    """What the module hands to Modal's decorators, while Modal really registers it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._made: list[tuple[object, dict[str, Any]]] = []
        for method in ("function", "cls"):
            monkeypatch.setattr(modal.App, method, self._recording(getattr(modal.App, method)))
        specification = importlib.util.spec_from_file_location("modal_app", ROOT / "modal_app.py")
        assert specification is not None
        assert specification.loader is not None
        self.module: ModuleType = importlib.util.module_from_spec(specification)
        monkeypatch.setitem(sys.modules, "modal_app", self.module)
        specification.loader.exec_module(self.module)
        self.by_name = {
            name: options for name, value in vars(self.module).items() for made, options in self._made if value is made
        }

    def _recording(self, decorate: Any) -> Any:
        def record(app: modal.App, **options: Any) -> Any:
            def register(target: Any) -> Any:
                made = decorate(app, **options)(target)
                self._made.append((made, options))
                return made

            return register

        return record


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Registered:
    return Registered(monkeypatch)


def test_it_imports_and_registers_where_nothing_can_connect() -> None:
    program = (
        "import socket\n"
        "def refuse(*_): raise SystemExit('it connects')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "import modal_app\n"
        "assert modal_app.app.name == 'modal-sdxl-lora'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_needs_no_gpu_stack_to_be_deployed() -> None:
    program = (
        "import sys, modal_app; print([name for name in ('torch', 'diffusers', 'consumer') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_gpu_class_a_scheduled_function_and_a_web_endpoint_are_registered(registered: Registered) -> None:
    assert set(registered.by_name) == {"Consumer", "scale", "web"}


def test_the_consumer_has_a_gpu_the_weights_the_secret_and_a_cost_cap(registered: Registered) -> None:
    options = registered.by_name["Consumer"]
    assert options["gpu"]
    assert options["volumes"] == {"/weights": registered.module.weights}
    assert options["secrets"] == [registered.module.secret]
    assert options["max_containers"] == registered.module.MAX_CONSUMERS
    assert options["timeout"] > registered.module.STOP_BEFORE_TIMEOUT_S
    assert hasattr(registered.module.Consumer(), "drain")


def test_missing_drains_are_spawned_every_minute_by_one_function_at_a_time(registered: Registered) -> None:
    options = registered.by_name["scale"]
    assert isinstance(options["schedule"], modal.Period)
    assert options["max_containers"] == 1
    assert "gpu" not in options


def test_the_web_endpoint_is_the_gateway_and_lets_nobody_in_without_a_token(
    registered: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MODAL_API_TOKEN", raising=False)
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    with TestClient(registered.module.web.local()) as client:
        assert client.get("/health").status_code == 503
        assert client.post("/generate-image", json={"prompt": "a red fox"}).status_code == 401


def test_the_project_is_the_one_that_is_pinned(registered: Registered) -> None:
    assert (ROOT / "constraints.txt").is_file()
    assert registered.by_name["Consumer"]["image"] is registered.module.gpu_image
    assert registered.by_name["scale"]["image"] is registered.by_name["web"]["image"] is registered.module.cpu_image
