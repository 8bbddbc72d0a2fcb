"""Reading a diffusers folder for the fast engine: every byte, and nothing that is not known."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from consumer.engine.fast import files, layout, reading
from consumer.engine.fast.checkpoint import Checkpoint, load_checkpoint
from consumer.engine.fast.fields import UnknownModel
from demo import loras

Edit = Callable[[dict[str, Any]], None]
UNET = "unet/diffusion_pytorch_model.safetensors"


def load(model: Path | str, vae: Path | None = None, dtype: torch.dtype = torch.float32) -> Checkpoint:
    place = torch.device("cpu")
    return load_checkpoint(str(model), vae=None if vae is None else str(vae), device=place, dtype=dtype, token=None)


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture(scope="module")
def stock(tiny_model: Path) -> dict[str, Tensor]:
    """Every parameter as the libraries load them, but the autoencoder's encoder."""
    modules = {
        "unet": UNet2DConditionModel.from_pretrained(tiny_model / "unet"),
        "text_encoder": CLIPTextModel.from_pretrained(tiny_model / "text_encoder"),
        "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(tiny_model / "text_encoder_2"),
        "vae": AutoencoderKL.from_pretrained(tiny_model / "vae"),
    }
    named = {f"{part}.{name}": tensor for part, module in modules.items() for name, tensor in module.named_parameters()}
    return {name: tensor for name, tensor in named.items() if not name.startswith(("vae.encoder", "vae.quant"))}


def edit(path: Path, change: Edit) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def rewrite(path: Path, change: Edit) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_parameter_is_the_libraries_own(tiny_model: Path, stock: dict[str, Tensor]) -> None:
    checkpoint = load(tiny_model)
    assert same(checkpoint.parameters, stock)
    assert [name for name in checkpoint.parameters if name.startswith("unet.")] == [
        f"unet.{name}" for name, _ in layout.unet(checkpoint.unet)
    ]
    assert checkpoint.zeros
    assert checkpoint.vae.factor == 8


def test_they_are_converted_except_for_an_autoencoder_that_would_overflow(
    folder: Path, stock: dict[str, Tensor]
) -> None:
    """Guards `vae_type` in `load_checkpoint`."""
    for upcast, expected in ((True, torch.float32), (False, torch.float16)):
        edit(folder / "vae" / "config.json", partial(dict.update, force_upcast=upcast))
        parameters = load(folder, dtype=torch.float16).parameters
        assert parameters["vae.decoder.conv_in.weight"].dtype == expected
        assert torch.equal(parameters["unet.conv_in.weight"], stock["unet.conv_in.weight"].half())
    assert load(folder, dtype=torch.bfloat16).parameters["vae.decoder.conv_in.weight"].dtype == torch.bfloat16


def test_what_a_lora_may_change_is_what_the_modules_say(tiny_model: Path) -> None:
    checkpoint, theirs = load(tiny_model), loras.shapes_of(tiny_model)
    ours = checkpoint.shapes()
    assert (ours.weights, ours.names, ours.sgm) == (theirs.weights, theirs.names, theirs.sgm)
    assert (ours.vectors, ours.cross_attention_dim) == (theirs.vectors, theirs.cross_attention_dim)


def test_files_of_many_chunks_and_of_other_types_are_read_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards `_chunks` and `_fill`."""
    monkeypatch.setattr(reading, "_CHUNK_BYTES", 100)
    generator = torch.Generator().manual_seed(1)
    shapes = [(7, 5), (3,), (1,), (16, 3, 3, 3), (0, 4), (2, 2)]
    types = [torch.float32, torch.float16, torch.bfloat16]
    tensors = {
        f"{dtype}.{index}".removeprefix("torch."): torch.randn(shape, generator=generator).to(dtype)
        for index, shape in enumerate(shapes)
        for dtype in types
    }
    save_file(tensors | {"steps": torch.arange(3)}, tmp_path / "x.safetensors", {"format": "pt"})

    def read(wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        return reading.read_tensors(tmp_path / "x.safetensors", torch.device("cpu"), wanted)

    assert same(read(lambda name: name != "steps"), tensors)
    odd = {name: tensor for name, tensor in tensors.items() if name.endswith((".0", ".2", ".3"))}
    assert same(read(odd.__contains__), odd)
    assert read(lambda name: False) == {}
    with pytest.raises(UnknownModel, match="steps is of type I64"):
        read(lambda name: True)


def test_a_tensor_at_an_odd_address_is_unknown(tmp_path: Path) -> None:
    """Guards `_view`: no file that safetensors wrote has one."""
    header = {
        "a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(6))
    with pytest.raises(UnknownModel, match="b is not aligned"):
        reading.read_tensors(tmp_path / "x.safetensors", torch.device("cpu"), lambda name: True)


def test_a_file_that_is_cut_off_is_refused(folder: Path) -> None:
    path = folder / UNET
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SafetensorError):
        load(folder)


def test_weights_in_several_files_and_names_of_old_are_read(folder: Path, stock: dict[str, Tensor]) -> None:
    """Guards the index in `weight_files`, `_is_wanted` and `_modern`."""
    tensors = load_file(folder / UNET)
    (folder / UNET).unlink()
    names = sorted(tensors)
    shards = {"part-1.safetensors": names[:100], "part-2.safetensors": names[100:]}
    for shard, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, folder / "unet" / shard)
    weight_map = {name: shard for shard, inside in shards.items() for name in inside}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    old = {
        f"text_model.{name}": tensor for name, tensor in load_file(folder / "text_encoder/model.safetensors").items()
    }
    old["text_model.embeddings.position_ids"] = torch.arange(77)
    save_file(old, folder / "text_encoder" / "model.safetensors")
    assert same(load(folder).parameters, stock)


def test_an_autoencoder_whose_attention_is_named_as_of_old_is_read(folder: Path, stock: dict[str, Tensor]) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(path)
    for new, old in names.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in tensors
    save_file(tensors, path)
    assert same(load(folder).parameters, stock)


def test_half_precision_files_come_first_where_there_are_some(folder: Path) -> None:
    """Guards `weight_files`."""
    both = folder / "unet", "diffusion_pytorch_model"
    assert [path.name for path in files.weight_files(*both, "fp16")] == ["diffusion_pytorch_model.safetensors"]
    shutil.copy(folder / UNET, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert [path.name for path in files.weight_files(*both, "fp16")] == ["diffusion_pytorch_model.fp16.safetensors"]
    assert [path.name for path in files.weight_files(*both, None)] == ["diffusion_pytorch_model.safetensors"]


def test_another_autoencoder_can_be_put_in(tiny_model: Path, folder: Path) -> None:
    def brighten(tensors: dict[str, Any]) -> None:
        tensors["decoder.conv_out.bias"] += 1

    rewrite(folder / "vae" / "diffusion_pytorch_model.safetensors", brighten)
    own, other = load(tiny_model).parameters, load(tiny_model, vae=folder / "vae").parameters
    assert [name for name in own if not torch.equal(own[name], other[name])] == ["vae.decoder.conv_out.bias"]
    with pytest.raises(UnknownModel):
        load(tiny_model, vae=tiny_model / "unet")


def test_of_a_hub_only_what_is_read_is_fetched(tiny_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the patterns of `model_folder` and `vae_folder`."""
    calls: list[tuple[str, str | None]] = []
    whole = folder.parent / "hub"
    shutil.copytree(tiny_model, whole)
    for name in ("unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.non_ema.safetensors", "x.ckpt"):
        (whole / name).write_bytes(b"")
    (whole / UNET).rename(whole / UNET.replace(".safetensors", ".fp16.safetensors"))
    shutil.copy(whole / "vae" / "config.json", whole)
    shutil.copy(whole / "vae" / "diffusion_pytorch_model.safetensors", whole)
    local = folder.parent / "local"

    def fetch(repository: str, *, allow_patterns: list[str], token: str | None) -> str:
        calls.append((repository, token))
        present = [str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()]
        for path in filter_repo_objects(present, allow_patterns=allow_patterns):
            (local / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(whole / path, local / path)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert files.model_folder("someone/model", "hf_x", "fp16") == local
    weights = sorted(str(path.relative_to(local)) for path in local.rglob("*.safetensors"))
    parts = [
        *("text_encoder/model.safetensors", "text_encoder_2/model.safetensors"),
        *("unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors"),
    ]
    assert weights == parts
    assert not [path for path in local.rglob("*") if path.suffix in {".bin", ".ckpt"}]
    assert calls == [("someone/model", "hf_x")] * 2
    assert files.vae_folder("someone/vae", None) == local
    assert (local / "diffusion_pytorch_model.safetensors").exists()


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}),
        ("model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]}),
        ("model_index.json", {"text_encoder_2": None}),
        ("model_index.json", {"tokenizer": ["transformers", "T5Tokenizer"]}),
        ("model_index.json", {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}),
        ("model_index.json", {"motion_adapter": ["diffusers", "MotionAdapter"]}),
        ("unet/config.json", {"use_linear_projection": False}),
        ("unet/config.json", {"addition_embed_type": None}),
        ("unet/config.json", {"act_fn": "gelu"}),
        ("unet/config.json", {"down_block_types": ["DownBlock2D"] * 2 + ["AttnDownBlock2D"]}),
        ("unet/config.json", {"up_block_types": ["CrossAttnUpBlock2D"] * 3}),
        ("unet/config.json", {"upcast_attention": True}),
        ("unet/config.json", {"conv_in_kernel": 1}),
        ("unet/config.json", {"mid_block_scale_factor": True}),
        ("unet/config.json", {"in_channels": 9}),
        ("unet/config.json", {"layers_per_block": [1, 1, 2]}),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 113}),
        ("unet/config.json", {"cross_attention_dim": 95}),
        ("unet/config.json", {"new_trick": True}),
        ("vae/config.json", {"up_block_types": ["AttnUpDecoderBlock2D"] * 4}),
        ("vae/config.json", {"latents_mean": [0.0] * 4}),
        ("vae/config.json", {"shift_factor": 0.1}),
        ("vae/config.json", {"use_post_quant_conv": False}),
        ("text_encoder/config.json", {"hidden_act": "relu"}),
        ("unet/config.json", {"attention_head_dim": [1, 1, 3]}),
        ("unet/config.json", {"attention_head_dim": [1, 1, 8]}),
        ("text_encoder/config.json", {"max_position_embeddings": 248}),
        ("text_encoder_2/config.json", {"architectures": ["CLIPTextModel"]}),
        ("text_encoder_2/config.json", {"quantization_config": {}}),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}),
        ("scheduler/scheduler_config.json", {"timestep_type": "continuous"}),
        ("scheduler/scheduler_config.json", {"interpolation_type": "log_linear"}),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}),
        ("scheduler/scheduler_config.json", {"use_exponential_sigmas": True}),
        ("scheduler/scheduler_config.json", {"use_beta_sigmas": True}),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}),
        ("scheduler/scheduler_config.json", {"final_sigmas_type": "sigma_min"}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "squaredcos_cap_v2"}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 1000.5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_model_that_does_anything_else_is_unknown_by_the_name_of_it(
    folder: Path, file: str, changes: dict[str, Any]
) -> None:
    """Guards `Fields` and every reader in `consumer.engine.fast.configs`, and `_fit`."""
    edit(folder / file, lambda values: values.update(changes))
    with pytest.raises(UnknownModel) as unknown:
        load(folder)
    assert next(iter(changes)) in str(unknown.value) or "made for" in str(unknown.value)


def test_configurations_as_the_published_model_has_them_are_known(folder: Path) -> None:
    """Nulls for false, keys of other schedulers and of old versions, keys that are left out."""

    def older(values: dict[str, Any]) -> None:
        values["upcast_attention"] = None
        for key in ("attention_type", "dropout", "reverse_transformer_layers_per_block"):
            del values[key]

    edit(folder / "unet" / "config.json", older)
    edit(
        folder / "scheduler" / "scheduler_config.json",
        lambda values: values.update(
            clip_sample=False, sample_max_value=1.0, set_alpha_to_one=False, skip_prk_steps=True
        ),
    )
    edit(folder / "text_encoder" / "config.json", lambda values: values.update(dropout=0.0, torch_dtype="float16"))
    edit(folder / "model_index.json", lambda values: values.update(add_watermarker=None))
    edit(folder / "vae" / "config.json", lambda values: values.update(_name_or_path="../sdxl-vae/"))
    load(folder)


@pytest.mark.parametrize("kind", ["missing", "another shape", "extra", "no file", "pickles only"])
def test_weights_that_are_not_the_architectures_are_unknown(folder: Path, kind: str) -> None:
    """Guards `_Part.read` and `weight_files`."""
    changes: dict[str, Edit] = {
        "missing": lambda tensors: tensors.pop("conv_in.bias"),
        "another shape": lambda tensors: tensors.update({"conv_in.bias": torch.zeros(33)}),
        "extra": lambda tensors: tensors.update({"position_net.weight": torch.zeros(3)}),
    }
    if kind in changes:
        rewrite(folder / UNET, changes[kind])
    else:
        (folder / UNET).unlink()
    if kind == "pickles only":
        (folder / UNET).with_suffix(".bin").write_bytes(b"")
    with pytest.raises(UnknownModel, match="unet"):
        load(folder)
