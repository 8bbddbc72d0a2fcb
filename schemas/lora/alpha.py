"""The number that an alpha tensor holds."""

import math
import struct
from typing import BinaryIO

from schemas.lora.errors import LoraUnusable
from schemas.lora.header import Header, not_safetensors, shown

# Trainers keep alpha as it was configured, an integer or a double, or cast it with the rest of the file.
ALPHA_FORMATS = {
    "F64": "<d", "F32": "<f", "BF16": "<f", "F16": "<e", "F8_E5M2": "<e", "F8_E4M3": "<B",
    "I64": "<q", "I32": "<i", "I16": "<h",
}  # fmt: skip
_UPPER_HALVES = {"BF16": b"\0\0", "F8_E5M2": b"\0"}  # of a float32, of a float16


def read_alpha(name: str, header: Header, file: BinaryIO) -> float:
    """The alpha in the tensor `name`, whose dtype is one of ALPHA_FORMATS, of the file whose header this is.

    Raises LoraUnusable for NaN and Inf, and where the file ends too early.
    """
    tensor = header.tensors[name]
    file.seek(header.data_start + tensor.start)
    raw = _UPPER_HALVES.get(tensor.dtype, b"") + file.read(tensor.end - tensor.start)
    try:
        (number,) = struct.unpack(ALPHA_FORMATS[tensor.dtype], raw)
    except struct.error:
        raise not_safetensors("it was cut short while it was read") from None
    alpha = _from_e4m3(number) if tensor.dtype == "F8_E4M3" else float(number)
    if not math.isfinite(alpha):
        raise LoraUnusable(f"The tensor '{shown(name)}' has NaN or Inf.", details={"tensor": shown(name)})
    return alpha


def _from_e4m3(bits: int) -> float:
    """A sign, 4 bits of exponent, 3 of fraction; there is no Inf, and NaN is all ones behind the sign."""
    sign, exponent, fraction = -1.0 if bits >> 7 else 1.0, bits >> 3 & 15, bits & 7
    if bits & 0x7F == 0x7F:
        return math.nan
    return sign * (math.ldexp(8 + fraction, exponent - 10) if exponent else math.ldexp(fraction, -9))
