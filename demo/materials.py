"""`python -m demo.materials MODEL LORAS`: writes the tiny model and the demo's LoRA files into two folders.

A process of its own: what PyTorch and its company say while they load goes to a log, and their memory is given back.
"""

import sys
from pathlib import Path

from demo import loras, tiny_sdxl


def write(model: Path, files: Path) -> None:
    """Writes a diffusers folder, and LoRAs in the naming schemes of PEFT and of kohya."""
    shapes = loras.shapes_of(tiny_sdxl.build(model))
    unet = loras.attention_modules(shapes)
    everything = loras.attention_modules(shapes, text_encoders=True)
    files.mkdir()
    loras.write_peft(files / "aurora.safetensors", unet, seed=1, strength=1.0)
    loras.write_kohya(files / "ember.safetensors", unet, shapes, seed=2, strength=1.0)
    loras.write_kohya(files / "inkwash.safetensors", everything, shapes, seed=3, strength=1.0)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
