"""The LoRA's configuration where PEFT and diffusers keep it: as JSON in the file's metadata.

diffusers packs each component's `LoraConfig` under its prefix (`unet.lora_alpha`, `unet.alpha_pattern`), and
`UNet2DConditionModel.save_lora_adapter` writes it without one.
"""

import math
import re
import sys
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from schemas import strict_json
from schemas.lora.errors import LoraUnusable
from schemas.lora.header import shown

METADATA_KEY = "lora_adapter_metadata"

MAX_CONFIG_BYTES = 1024 * 1024

# What PEFT begins a LoRA with, taking it off the base: the tensors alone are then not the change.
_OFF_THE_BASE = re.compile(r"pissa|olora|loftq|corda|lora_ga", re.IGNORECASE)

_LITERAL_PATTERN = re.compile(r"\^?(?P<path>[\w.]+)\$?")


class AdapterConfig:
    """What the metadata say about scaling.

    Raises LoraUnusable where they are broken or ask for what is not supported.
    """

    def __init__(self, metadata: Mapping[str, str]) -> None:
        text = metadata.get(METADATA_KEY, "{}").encode("utf-8")
        if len(text) > MAX_CONFIG_BYTES:
            raise _broken(f"longer than {MAX_CONFIG_BYTES} bytes")
        try:
            config = strict_json.loads(text)
        except strict_json.StrictJsonError as error:
            raise _broken(str(error)) from None
        if not isinstance(config, dict):
            raise _broken("not a JSON object")
        _refuse_other_bases(config)
        self._config: dict[str, Any] = config
        self._patterns: dict[str, dict[str, tuple[int, Any]]] = {}

    def alpha(self, module: str, rank: int) -> float:
        """The `alpha` for which `alpha / rank` is PEFT's scaling of this module (`unet.conv_in`): `rank` if unsaid."""
        component, path = module.split(".", 1)
        alpha = self._of_pattern(component, path, self._get(component, "lora_alpha"))
        if alpha is None:
            return float(rank)
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or abs(alpha) > sys.float_info.max:
            raise _broken("an alpha that is no finite number")
        # rank-stabilised LoRA scales by alpha / sqrt(rank)
        scaled = alpha * math.sqrt(rank) if self._get(component, "use_rslora") else float(alpha)
        if not math.isfinite(scaled):
            raise _broken("an alpha that is no finite number")
        return scaled

    def uses_dora(self, module: str) -> bool:
        """Whether the LoRA of this module is to be DoRA."""
        return bool(self._get(module.split(".", 1)[0], "use_dora"))

    def _of_pattern(self, component: str, path: str, otherwise: Any) -> Any:
        """The alpha of the first pattern that is the end of a module's path."""
        if component not in self._patterns:
            self._patterns[component] = _by_path(self._get(component, "alpha_pattern") or {})
        parts = f"text_model.{path}".split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        found = [self._patterns[component][end] for end in ends if end in self._patterns[component]]
        return min(found, key=itemgetter(0))[1] if found else otherwise

    def _get(self, component: str, field: str) -> Any:
        value = self._config.get(f"{component}.{field}", self._config.get(field))
        if field == "alpha_pattern" and not isinstance(value, dict | None):
            raise _broken("alpha_pattern is not an object")
        return value


def _refuse_other_bases(config: Mapping[str, Any]) -> None:
    for field, value in config.items():
        if field.endswith("init_lora_weights") and isinstance(value, str) and _OFF_THE_BASE.match(value):
            kind = shown(value)
            raise LoraUnusable(
                f"The LoRA is for another base: one less what it began with ({kind}). Convert it to a plain LoRA.",
                details={"kind": kind},
            )


def _by_path(patterns: Mapping[str, Any]) -> dict[str, tuple[int, Any]]:
    """Each pattern's place and alpha by the path that it is; a search through them for each module would take hours.

    PEFT takes them as regular expressions. They come from a stranger, and what PEFT and diffusers write are paths.
    """
    found: dict[str, tuple[int, Any]] = {}
    for place, (pattern, alpha) in enumerate(patterns.items()):
        literal = _LITERAL_PATTERN.fullmatch(pattern.replace(r"\.", "."))
        if literal is None:
            raise LoraUnusable(
                f"The LoRA's own configuration is not supported: {METADATA_KEY}: alpha_pattern: '{shown(pattern)}' is"
                " not a module's path.",
                details={"pattern": shown(pattern)},
            )
        found.setdefault(literal["path"], (place, alpha))
    return found


def _broken(problem: str) -> LoraUnusable:
    return LoraUnusable(f"The LoRA's own configuration is broken: {METADATA_KEY}: {problem}.")
