"""The tiny model itself: the same bytes every time, and pictures that people can look at."""

import hashlib
from pathlib import Path

import torch
from transformers import CLIPTokenizer

from demo import loras, tiny_sdxl
from schemas.lora.shapes import ModelShapes


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_it_is_built_of_the_same_bytes_every_time(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)  # of which it must not depend
    assert digests(tiny_sdxl.build(tmp_path)) == digests(tiny_model)


def test_it_has_every_part_of_sdxl_and_no_pickle(tiny_model: Path) -> None:
    parts = {path.name for path in tiny_model.iterdir() if path.is_dir()}
    assert parts == {"scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae"}
    assert not [path for path in tiny_model.rglob("*") if path.suffix in {".bin", ".pt", ".ckpt"}]


def test_its_modules_are_named_as_in_sdxl(shapes: ModelShapes) -> None:
    for name in (
        "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_k",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_projection",
    ):
        assert name in shapes.names


def test_its_tokenizers_know_common_words_and_every_byte(tiny_model: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(tiny_model / "tokenizer")
    assert tokenizer.model_max_length == 77
    assert len(tokenizer("a red flower").input_ids) == 3 + 2
    strange = tokenizer("Жéø 夜").input_ids
    assert tokenizer.unk_token_id not in strange[1:-1]
    assert len(strange) > 6


def test_its_loras_for_sd_15_and_the_strength_are_as_told(shapes: ModelShapes) -> None:
    modules = loras.attention_modules(shapes)
    assert all(".attn" in name for name in modules)
    assert len(loras.attention_modules(shapes, text_encoders=True)) > len(modules)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = loras.deltas(modules, rank=4, alpha=8.0, seed=1, strength=0.5)[name]
    change = 8.0 / 4 * up @ down
    assert 0.3 < float(change.std()) * 64**0.5 < 0.8
