"""What a LoRA file is, and whether it fits SDXL: told from its header, by the code that consumers read it with."""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from schemas.lora.errors import LoraUnusable
from schemas.lora.header import Header, read_header
from schemas.lora.keys import is_down
from schemas.lora.plan import LoraPlan, plan
from schemas.lora.sdxl_base import sdxl_base
from schemas.redact import redact_text

_DOTTED_PART = r"(lora_[AB]\.|hada_|lokr_|diff)"
_NAMINGS = {
    "kohya, original block names": re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks|time_embed_|out_)"),
    "kohya, diffusers block names": re.compile(r"lora_unet_(down_blocks|mid_block|up_blocks|conv_|time_embedding)"),
    "LyCORIS, diffusers block names": re.compile(r"lycoris_(down_blocks|mid_block|up_blocks|conv_|time_embedding)"),
    "ComfyUI": re.compile(r"diffusion_model\.|text_encoders\."),
    "kohya, text encoders": re.compile(r"lora_te\d?_"),
    "PEFT": re.compile(r"base_model\.model\."),
    "diffusers": re.compile(rf"(unet|text_encoder(_2)?)\..*\.{_DOTTED_PART}"),
    "diffusers, the UNet alone": re.compile(
        rf"(down_blocks|mid_block|up_blocks|conv_|time_embedding).*\.{_DOTTED_PART}"
    ),
    "diffusers before PEFT": re.compile(r".*(\.lora\.|_lora\.|\.lora_linear_layer\.)(down|up)\."),
}
_TOLD_METADATA = (
    *("modelspec.title", "modelspec.architecture", "modelspec.trigger_phrase", "modelspec.license"),
    *("ss_output_name", "ss_base_model_version", "ss_sd_model_name", "ss_network_module", "ss_resolution"),
)
_MAX_TOLD = 200


@dataclass(frozen=True, slots=True)
class LoraReport:
    """What is known of a file. `header`: None where there is none; either `planned` or `refusal` is None."""

    size_bytes: int
    sha256: str
    header: Header | None
    planned: LoraPlan | None
    refusal: LoraUnusable | None

    @property
    def naming(self) -> list[str]:
        """In whose manner the tensors are named: usually one, and one more for text encoders."""
        names = self.header.tensors if self.header else ()
        return [naming for naming, pattern in _NAMINGS.items() if any(map(pattern.match, names))]

    @property
    def dtypes(self) -> list[str]:
        """The distinct ones of the weights."""
        tensors = self.header.tensors if self.header else {}
        return sorted({tensor.dtype for name, tensor in tensors.items() if not name.endswith(".alpha")})

    @property
    def kinds(self) -> list[str]:
        """The distinct ones, in words: `LoRA`, `DoRA on LoHa`, ..."""
        deltas = self.planned.deltas if self.planned else ()
        return sorted({delta.kind if delta.magnitude is None else f"DoRA on {delta.kind}" for delta in deltas})

    @property
    def ranks(self) -> list[int]:
        """The distinct ones, of what the file has even where it is refused."""
        if self.planned is not None:
            return sorted({delta.rank for delta in self.planned.deltas if delta.rank is not None})
        tensors = self.header.tensors if self.header else {}
        return sorted({tensor.shape[0] for name, tensor in tensors.items() if is_down(name) and tensor.shape})

    @property
    def alphas(self) -> list[float]:
        """The distinct ones of what would be changed."""
        deltas = self.planned.deltas if self.planned else ()
        return sorted({delta.alpha for delta in deltas if delta.alpha is not None})

    @property
    def modules(self) -> dict[str, int]:
        """How many modules of each component would be changed."""
        modules = dict.fromkeys(delta.module for delta in self.planned.deltas) if self.planned else {}
        return dict(Counter(name.split(".", 1)[0] for name in modules))

    @property
    def metadata(self) -> dict[str, str]:
        """What trainers write about the model and themselves, shortened."""
        known = self.header.metadata if self.header else {}
        return {name: redact_text(known[name])[:_MAX_TOLD] for name in _TOLD_METADATA if known.get(name)}


def check_lora(path: Path) -> LoraReport:
    """Reads the header of a file for SDXL base, and all its bytes once for their digest; blocks.

    Weights are not looked at: only consumers find NaN, Inf, and values that would overflow. Raises OSError where the
    file cannot be read.
    """
    header, planned, refusal = None, None, None
    try:
        header = read_header(path)
        planned = plan(path, header, sdxl_base())
    except LoraUnusable as error:
        refusal = error
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return LoraReport(path.stat().st_size, sha256, header, planned, refusal)
