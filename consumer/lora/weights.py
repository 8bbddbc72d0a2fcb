"""The model's parameters: patched in place from a pristine copy, and exactly themselves again afterwards."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import structlog
import torch
from torch import Tensor

from consumer.errors import ModelBroken, WeightsChanged
from consumer.lora.deltas import Delta, LowRankDelta, with_tensors
from consumer.lora.low_rank import DeltaBuffer, PackedDeltas, Parts, patch_rows_by_torch
from consumer.lora.stacks import Place, Stack, runs, stacked
from consumer.triton_support import why_no_triton

SAMPLES = 100  # how many of them look at everything

PatchRows = Callable[[Stack, PackedDeltas], None]
Changes = dict[Place, list[tuple[Delta, float]]]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Patch:
    """What some LoRAs together make of the parameters at `places`, on the model's device.

    `low_rank`: packed by stack; `others`: one parameter at a time. On a GPU all of it is there once `ready` has come.
    """

    places: frozenset[Place]
    low_rank: tuple[PackedDeltas, ...]
    others: Changes
    tensors: tuple[Tensor, ...]
    ready: torch.cuda.Event | None

    def arrive(self) -> None:
        """Makes the current stream wait for what is still on its way, and keeps it until the stream has used it."""
        if self.ready is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.ready)
            for tensor in self.tensors:
                tensor.record_stream(stream)


class PatchableWeights:
    """Every parameter that a LoRA may touch, and a pristine copy of each on the same device.

    `parameters`: by name, as in `unet.conv_in.weight`, all on one device. They are copied; what runs the model takes
    the live views in their place. Those of one shape and dtype that follow each other are adjacent. If `channels_last`,
    convolutions' weights lie in memory as [out, height, width, in].

    Parameters are written in place, so their addresses stay: a compiled or captured model goes on as it is. Only
    `prepare` is safe against another thread that runs the model at the same time.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, channels_last: bool = False) -> None:
        self._stacks, self._places = stacked(parameters, channels_last=channels_last)
        self._order = sorted(self._places.values())
        self._sample_bytes = -(-sum(self._stacks[place.stack].row_bytes for place in self._order) // SAMPLES)
        self._next = 0
        self._dirty: set[Place] = set()
        self._written: set[Place] = set()
        self._device = next(iter(parameters.values())).device
        self._side = _side_stream(self._device)
        self._patch_rows, self._compile_ahead = _kernels(self._device)

    def __getitem__(self, name: str) -> Tensor:
        """The live parameter: a view at an address that never changes, in the model's shape."""
        stack, row = self._places[name]
        return self._stacks[stack].shaped(self._stacks[stack].live[row])

    def rows(self, first: str, count: int) -> Tensor:
        """A linear layer's weight and those of its shape that follow, as one live matrix [count * out, in].

        Raises ValueError where there are fewer.
        """
        stack, row = self._places[first]
        live = self._stacks[stack].live
        if row + count > len(live):
            raise ValueError(f"only {len(live) - row} weights of its shape begin with {first}")
        return live[row : row + count].flatten(0, 1)

    @property
    def touched(self) -> frozenset[str]:
        """The parameters that were written, patched or copied back, since `settle` was called last."""
        return frozenset(name for name, place in self._places.items() if place in self._written)

    def settle(self) -> None:
        """Says that whatever is derived from the parameters that were `touched` has been made anew."""
        self._written.clear()

    @torch.no_grad()
    def prepare(self, loras: Sequence[tuple[Sequence[Delta], float]]) -> Patch:
        """Packs the deltas of each LoRA with its scale, and sends them to the model's device. For any thread.

        Raises KeyError for a parameter that is not there, and what the device raises.
        """
        low_rank: dict[int, dict[int, Parts]] = {}
        others: Changes = {}
        changes: Changes = {}
        for deltas, scale in loras:
            for delta in deltas if scale != 0 else ():
                changes.setdefault(self._places[f"{delta.module}.{delta.part}"], []).append((delta, scale))
        for place, parts in sorted(changes.items()):
            products = [(delta, scale) for delta, scale in parts if isinstance(delta, LowRankDelta)]
            if len(products) == len(parts):
                low_rank.setdefault(place.stack, {})[place.row] = products
            else:
                others[place] = parts
        buffer = DeltaBuffer(low_rank, self._stacks, pin=self._side is not None)
        with torch.cuda.stream(self._side):  # does nothing on a CPU, where there is none
            return self._send(frozenset(changes), buffer, others)

    @torch.no_grad()
    def patch(self, patch: Patch) -> None:
        """Makes every parameter `pristine + sum(scale * change)`, summed in float32 and rounded once.

        Parameters that the patch does not touch become pristine. If this raises, the parameters are in between, and
        the next `patch` or `restore` is exact all the same.
        """
        patch.arrive()
        self._copy_back(self._dirty - patch.places)
        self._dirty |= patch.places
        self._written |= patch.places
        for packed in patch.low_rank:
            self._patch_rows(self._stacks[packed.stack], packed)
        for place, parts in patch.others.items():
            self._change(place, parts)

    @torch.no_grad()
    def restore(self) -> None:
        """Makes every parameter pristine that was patched."""
        self._copy_back(set(self._dirty))

    @torch.no_grad()
    def changed(self) -> list[str]:
        """The parameters that differ from the pristine ones in any bit. Looks at all of them."""
        differing = [stack.differing(slice(None)).tolist() for stack in self._stacks]
        return [name for name, (stack, row) in self._places.items() if differing[stack][row]]

    @torch.no_grad()
    def sample(self) -> Tensor:
        """Looks at the next hundredth of the parameters: a number on the device, for `check`. Does not wait for it.

        It is 0 where those that are not patched are bit by bit the pristine ones, and the pristine ones are still
        what they were.
        """
        places = self._next_places()
        unpatched = [place for place in places if place not in self._dirty]
        wrong = [self._stacks[number].rotted(rows).any() for number, rows in runs(places)]
        wrong += [self._stacks[number].differing(rows).any() for number, rows in runs(unpatched)]
        return torch.stack(wrong).sum()

    @torch.no_grad()
    def check(self, sample: Tensor) -> None:
        """Waits for a sample. Where it is not 0, makes every parameter pristine.

        Raises WeightsChanged, and ModelBroken where the pristine parameters are not what they were.
        """
        if not int(sample):
            return
        foreign = [name for name in self.changed() if self._places[name] not in self._dirty]
        rotted = sum(int(stack.rotted(slice(None)).sum()) for stack in self._stacks)
        log.error("weights_changed", parameters=len(foreign), first=foreign[:3], pristine=rotted)
        if rotted:
            raise ModelBroken(f"{rotted} of the model's pristine parameters have changed in memory")
        self._copy_back(set(self._order))
        raise WeightsChanged(f"{len(foreign)} of the model's parameters had changed in memory beside the LoRAs")

    def _send(self, places: frozenset[Place], buffer: DeltaBuffer, others: Changes) -> Patch:
        """Copies on the current stream."""
        tensors: list[Tensor] = []

        def sent(tensor: Tensor) -> Tensor:
            tensors.append(tensor.to(self._device, non_blocking=True))
            return tensors[-1]

        packed = buffer.packed(sent(buffer.bytes))
        moved = {
            place: [(with_tensors(delta, sent), scale) for delta, scale in parts] for place, parts in others.items()
        }
        for deltas in packed:
            self._compile_ahead(self._stacks[deltas.stack], deltas)
        ready = None if self._side is None else self._side.record_event()
        return Patch(places, packed, moved, tuple(tensors), ready)

    def _change(self, place: Place, parts: Sequence[tuple[Delta, float]]) -> None:
        stack = self._stacks[place.stack]
        base = stack.shaped(stack.pristine[place.row]).float().contiguous()
        weight = base.clone()
        for delta, scale in parts:
            weight.add_(delta.change(base), alpha=scale)
        stack.shaped(stack.live[place.row]).copy_(weight)

    def _copy_back(self, places: set[Place]) -> None:
        self._written |= places
        for number, rows in runs(places):
            self._stacks[number].copy_back(rows)
        self._dirty -= places

    def _next_places(self) -> list[Place]:
        """The next ones of a round through all places, at least a hundredth of their bytes."""
        places: list[Place] = []
        size = 0
        while size < self._sample_bytes:
            place = self._order[self._next]
            self._next = (self._next + 1) % len(self._order)
            places.append(place)
            size += self._stacks[place.stack].row_bytes
        return places


def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types for it


def _kernels(device: torch.device) -> tuple[PatchRows, PatchRows]:
    """What patches rows on the device, and what readies that ahead."""
    if device.type == "cuda" and why_no_triton() is None:
        from consumer.lora.patch_kernel import compile_ahead, patch_rows

        return patch_rows, compile_ahead
    return patch_rows_by_torch, lambda stack, packed: None
