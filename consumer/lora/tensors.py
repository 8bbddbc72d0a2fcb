"""The tensors of a checked safetensors file, read at once, and how large their numbers are."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from schemas.lora.header import Header, TensorInfo, not_safetensors

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_BITS: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_CHUNK = 1 << 17  # numbers; a core's cache holds them
_MAX_GAP_BYTES = 4096  # between tensors that are read in one go: kohya's alphas


class FileTensors:
    """The named tensors of a file whose header has been checked, copied out of it.

    Raises LoraUnusable where the file ends too early, and OSError where it cannot be read.
    """

    def __init__(self, path: Path, header: Header, names: Iterable[str]) -> None:
        self._infos = {name: header.tensors[name] for name in names}
        self._bytes: dict[str, Tensor] = {}
        with path.open("rb", buffering=0) as file:
            for start, end, within in _spans(self._infos):
                span = torch.empty(end - start, dtype=torch.uint8)
                file.seek(header.data_start + start)
                if _fill(file, span.numpy().data) < end - start:
                    raise not_safetensors("it was cut short while it was read")
                for name in within:
                    info = self._infos[name]
                    self._bytes[name] = span[info.start - start : info.end - start]

    def __getitem__(self, name: str) -> Tensor:
        """The named tensor: float32, float16 or bfloat16, of the file's shape. 8-bit floats become float16, exactly."""
        info, raw = self._infos[name], self._bytes[name]
        dtype = _DTYPES[info.dtype]
        if raw.storage_offset() % dtype.itemsize:
            raw = raw.clone()
        numbers = raw.view(dtype)
        return (numbers.half() if dtype.itemsize == 1 else numbers).view(info.shape)

    def largest(self, name: str) -> float:
        """The largest absolute value in a tensor; NaN or Inf where one of its numbers is that.

        The bits of a float without its sign are in the order of its size, and those of Inf and NaN come last: a tenth
        of the time of looking at each number as a float.
        """
        dtype = _DTYPES[self._infos[name].dtype]
        bits = _BITS[dtype.itemsize]
        numbers = self._bytes[name].numpy().view(bits)
        unsigned = bits((1 << 8 * dtype.itemsize - 1) - 1)
        chunks = (numbers[place : place + _CHUNK] for place in range(0, len(numbers), _CHUNK))
        largest = np.asarray(max((chunk & unsigned).max() for chunk in chunks), bits)
        return float(torch.frombuffer(bytearray(largest.tobytes()), dtype=dtype).float())


def _spans(infos: dict[str, TensorInfo]) -> Iterator[tuple[int, int, list[str]]]:
    """Start and end of what is to be read in one go, and the tensors therein: what is not asked for stays out."""
    span: tuple[int, int, list[str]] | None = None
    for name, info in sorted(infos.items(), key=lambda item: item[1].start):
        if span is not None and info.start - span[1] <= _MAX_GAP_BYTES:
            span[2].append(name)
            span = (span[0], info.end, span[2])
            continue
        if span is not None:
            yield span
        span = (info.start, info.end, [name])
    if span is not None:
        yield span


def _fill(file: Any, into: memoryview) -> int:
    """Reads until `into` is full or the file ends; returns the bytes read."""
    done = 0
    while done < len(into) and (count := file.readinto(into[done:])):
        done += count
    return done
