"""The fast engine: the same around a picture as everywhere, with the fast painter inside."""

from typing import Self

from consumer.engine.common import describe
from consumer.engine.fast.fields import UnknownModel
from consumer.engine.fast.painter import FastPainter
from consumer.engine.painting import PaintingEngine
from consumer.errors import ModelBroken


class FastEngine(PaintingEngine):
    """SDXL without diffusers: see `consumer.engine.fast.painter`."""

    painter: FastPainter

    @classmethod
    def load(cls, model: str, *, vae: str | None = None, device: str, dtype: str, hub_token: str | None = None) -> Self:
        """Loads a diffusers folder or hub id, safetensors only; on a GPU its `fp16` variant where there is one.

        `dtype`: float16, bfloat16 or float32. Raises ModelBroken, and UnknownModel for a model that only the stock
        engine draws.
        """
        try:
            return cls(FastPainter.load(model, vae=vae, device=device, dtype=dtype, hub_token=hub_token))
        except UnknownModel:
            raise
        except Exception as error:
            raise ModelBroken(f"The model cannot be loaded: {describe(error)}") from error
