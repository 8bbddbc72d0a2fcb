"""What a LoRA file says itself that it was trained for, in its metadata."""

import re
from collections.abc import Mapping

from schemas.lora.errors import LoraUnusable
from schemas.lora.header import shown

# As kohya's scripts, ai-toolkit and SwarmUI write them. SDXL's begin with sdxl, sd_xl and stable-diffusion-xl.
_FIELDS = ("ss_base_model_version", "modelspec.architecture")
_OTHER_BASES = (
    (re.compile(r"(?i)(sd[ _-]?|stable-diffusion-)v?1"), "SD 1.x"),
    (re.compile(r"(?i)(sd[ _-]?|stable-diffusion-)v?2"), "SD 2.x"),
    (re.compile(r"(?i)(sdxl|stable-diffusion-xl)[\w-]*refiner"), "SDXL refiner"),
    (re.compile(r"(?i)(sd[ _-]?|stable-diffusion-)v?3"), "SD 3"),
    (re.compile(r"(?i)flux(?![a-z])"), "Flux"),
)


def refuse_other_bases(metadata: Mapping[str, str]) -> None:
    """Raises LoraUnusable where the metadata name another model; a name that is not known is no reason."""
    for field in _FIELDS:
        value = metadata.get(field, "")
        for pattern, model in _OTHER_BASES:
            if pattern.match(value):
                raise LoraUnusable(
                    f"The LoRA is for {model}, not for SDXL: its {field} is '{shown(value)}'.",
                    details={"looks_like": model, field: shown(value)},
                )
