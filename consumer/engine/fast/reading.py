"""Tensors of safetensors files straight into the memory of a device, by several threads at once."""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from consumer.engine.fast.fields import UnknownModel

_READERS = 8
_CHUNK_BYTES = 16 << 20
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor in a file: bytes `start` to `end`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Bytes of the file that go to the same number of bytes of the buffer."""

    start: int
    target: int
    size: int


def read_tensors(path: Path, device: torch.device, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors whose names are wanted, in the file's own order: views of one buffer on the device.

    Raises UnknownModel for types other than float32, float16 and bfloat16, and for tensors at odd addresses, OSError,
    and SafetensorError.
    """
    entries = list(_entries(path, wanted))
    offsets = [0, *accumulate(entry.end - entry.start for entry in entries)]
    buffer = torch.empty(offsets[-1], dtype=torch.uint8, device=device)
    places = list(zip(entries, offsets, strict=False))
    _fill(buffer, path, list(_chunks(places)))
    return {entry.name: _view(buffer, entry, offset) for entry, offset in places}


def _entries(path: Path, wanted: Callable[[str], bool]) -> Iterator[_Entry]:
    with safe_open(path, framework="pt"):  # checks the whole header
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if not wanted(name):
            continue
        if entry["dtype"] not in _TYPES:
            raise UnknownModel(f"{path.name}: {name} is of type {entry['dtype']}")
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        yield _Entry(name, _TYPES[entry["dtype"]], tuple(entry["shape"]), start, end)


def _chunks(places: list[tuple[_Entry, int]]) -> Iterator[_Chunk]:
    """The places, those side by side as one, cut into pieces that fit a reader's staging memory."""
    runs: list[_Chunk] = []
    for entry, offset in places:
        last = runs[-1] if runs else _Chunk(-1, 0, 0)
        if entry.start == last.start + last.size:
            runs[-1] = _Chunk(last.start, last.target, entry.end - last.start)
        else:
            runs.append(_Chunk(entry.start, offset, entry.end - entry.start))
    for run in runs:
        for done in range(0, run.size, _CHUNK_BYTES):
            yield _Chunk(run.start + done, run.target + done, min(_CHUNK_BYTES, run.size - done))


def _fill(buffer: Tensor, path: Path, chunks: list[_Chunk]) -> None:
    readers = min(_READERS, len(chunks))
    on_gpu = buffer.device.type == "cuda"
    if on_gpu:  # what its memory held before may still be read, on the stream that the buffer is of
        torch.cuda.current_stream(buffer.device).synchronize()

    def read(first: int) -> None:
        # from page-locked memory of its own, each reader copies without a detour and beside the others
        staging = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
        bytes_of = memoryview(staging.numpy().data)
        stream = torch.cuda.Stream(buffer.device) if on_gpu else None  # type: ignore[no-untyped-call]  # torch's
        with torch.cuda.stream(stream):
            for chunk in chunks[first::readers]:
                _read_exactly(file.fileno(), bytes_of[: chunk.size], chunk.start)
                buffer[chunk.target : chunk.target + chunk.size].copy_(staging[: chunk.size])

    with path.open("rb") as file, ThreadPoolExecutor(max(readers, 1)) as pool:
        list(pool.map(read, range(readers)))


def _read_exactly(file: int, target: memoryview, start: int) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(file, [target[done:]], start + done)
        if count == 0:
            raise OSError("The file ends too early.")
        done += count


def _view(buffer: Tensor, entry: _Entry, offset: int) -> Tensor:
    if offset % entry.dtype.itemsize:
        raise UnknownModel(f"{entry.name} is not aligned in its file")
    return buffer[offset : offset + entry.end - entry.start].view(entry.dtype).view(entry.shape)
