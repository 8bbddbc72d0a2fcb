"""The LoRA's configuration where PEFT and diffusers keep it: as JSON in the file's metadata.

diffusers packs each component's `LoraConfig` under its prefix (`unet.lora_alpha`, `unet.alpha_pattern`), and
`UNet2DConditionModel.save_lora_adapter` writes it without one.
"""

import math
import re
import sys
from collections.abc import Mapping
from typing import Any

from schemas import strict_json
from schemas.lora.errors import LoraUnusable

METADATA_KEY = "lora_adapter_metadata"

_LITERAL_PATTERN = re.compile(r"\^?(?P<path>[\w.]+)\$?")


class AdapterConfig:
    """What the metadata say about scaling.

    Raises LoraUnusable where they are broken or ask for what is not supported.
    """

    def __init__(self, metadata: Mapping[str, str]) -> None:
        try:
            config = strict_json.loads(metadata.get(METADATA_KEY, "{}").encode("utf-8"))
        except strict_json.StrictJsonError as error:
            raise _broken(str(error)) from None
        if not isinstance(config, dict):
            raise _broken("not a JSON object")
        self._config: dict[str, Any] = config

    def alpha(self, module: str, rank: int) -> float:
        """The `alpha` for which `alpha / rank` is PEFT's scaling of this module (`unet.conv_in`): `rank` if unsaid."""
        component, path = module.split(".", 1)
        if self._get(component, "use_dora"):
            raise LoraUnusable("The adapter is of a kind that is not supported: DoRA.", details={"kind": "DoRA"})
        alpha = self._get(component, "lora_alpha")
        for pattern, value in (self._get(component, "alpha_pattern") or {}).items():
            if _matches(pattern, path):
                alpha = value
                break
        if alpha is None:
            return float(rank)
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or abs(alpha) > sys.float_info.max:
            raise _broken("an alpha that is no finite number")
        # rank-stabilised LoRA scales by alpha / sqrt(rank)
        return alpha * math.sqrt(rank) if self._get(component, "use_rslora") else float(alpha)

    def _get(self, component: str, field: str) -> Any:
        value = self._config.get(f"{component}.{field}", self._config.get(field))
        if field == "alpha_pattern" and not isinstance(value, dict | None):
            raise _broken("alpha_pattern is not an object")
        return value


def _matches(pattern: str, path: str) -> bool:
    # PEFT takes these as regular expressions. They come from a stranger, and what PEFT and diffusers write are paths.
    literal = _LITERAL_PATTERN.fullmatch(pattern.replace(r"\.", "."))
    if literal is None:
        raise _broken("a pattern that is not a module's path")
    return f".text_model.{path}".endswith(f".{literal['path']}")


def _broken(problem: str) -> LoraUnusable:
    return LoraUnusable(f"The LoRA's own configuration is broken: {METADATA_KEY}: {problem}.")
