"""Where the files of a model are: a diffusers folder on this machine, or one that the hub's client brings."""

import json
from pathlib import Path
from typing import Any

from consumer.engine.fast.fields import UnknownModel

STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
_DESCRIPTIONS = ["model_index.json", "*/*.json", "*/merges.txt"]


def model_folder(model: str, token: str | None, variant: str | None) -> Path:
    """The folder itself, or the hub's: of each part the weights of the `variant`, where there are none the others.

    Raises the hub's own errors.
    """
    if Path(model).is_dir():
        return Path(model)
    wanted = [*_DESCRIPTIONS, *(f"{part}/{stem}.{variant}*safetensors" for part, stem in STEMS.items() if variant)]
    folder = _download(model, token, wanted)
    left = [part for part, stem in STEMS.items() if not list((folder / part).glob(f"{stem}.{variant}*safetensors"))]
    patterns = [pattern for part in left for pattern in _plain(f"{part}/", STEMS[part])]
    return _download(model, token, patterns) if patterns else folder


def vae_folder(vae: str, token: str | None) -> Path:
    """The folder itself, or the hub's. Raises the hub's own errors."""
    if Path(vae).is_dir():
        return Path(vae)
    return _download(vae, token, ["config.json", "*.index.json", *_plain("", STEMS["vae"])])


def weight_files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """The safetensors files of one part: one, or those of an index. Raises UnknownModel where there are none."""
    for dotted in (f".{variant}", "") if variant else ("",):
        single, index = folder / f"{stem}{dotted}.safetensors", folder / f"{stem}.safetensors.index{dotted}.json"
        if single.exists():
            return [single]
        if index.exists():
            return [folder / Path(name).name for name in sorted(set(read_json(index)["weight_map"].values()))]
    raise UnknownModel(f"{folder.name}: no {stem}.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """Raises OSError, and ValueError for what is no JSON."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _plain(prefix: str, stem: str) -> list[str]:
    return [f"{prefix}{stem}.safetensors", f"{prefix}{stem}-*-of-*.safetensors"]


def _download(repository: str, token: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repository, allow_patterns=patterns, token=token))
