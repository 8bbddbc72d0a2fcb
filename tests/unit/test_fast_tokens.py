"""Token ids of prompts, against `transformers.CLIPTokenizer` on the same folders."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizer
from transformers.utils import logging

from consumer.engine.fast.fields import UnknownModel
from consumer.engine.fast.tokens import ClipTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
PIECES = [
    *"abc xyz0123ABC!!,.<|>/_'\t\n\r\x00\x1f\x7f",
    *"\u00a0\u2003\u200b\u200d\u2028\ufeffe\u0301",
    *"ÀÉéßÿİıſﬁ²½Ⅷ日本語한글العربيةहिंदी🙂👩🇩🇪",
    *("</w>", START, END, START.upper(), "<|ENDOFTEXT|>", " flower", "mountains", "n't", "'ll", "'S", "red sea "),
]


def described(content: str, **fields: Any) -> dict[str, Any]:
    token = {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return token | fields


def typed(content: str) -> dict[str, Any]:
    return {"__type": "AddedToken", **described(content)}


def legacy_config(padding: str) -> dict[str, Any]:
    """tokenizer_config.json as SDXL base has it."""
    return {
        "add_prefix_space": False,
        "bos_token": typed(START),
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": typed(END),
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": padding,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": typed(END),
    }


def legacy(tiny_model: Path, folder: Path, config: dict[str, Any], special: dict[str, Any] | None = None) -> Path:
    """A tokenizer's folder as older versions wrote it: vocab.json and merges.txt."""
    model = json.loads((tiny_model / "tokenizer" / "tokenizer.json").read_text())["model"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if special is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of every form that SDXL models come in."""
    root = tmp_path_factory.mktemp("tokenizers")
    special = {"bos_token": described(START), "eos_token": described(END), "unk_token": described(END)}
    vocabulary = json.loads((tiny_model / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    added = {
        str(vocabulary["!"]): described("!", normalized=False, special=True),
        str(vocabulary[START]): described(START, special=True),
        str(vocabulary[END]): described(END, special=True),
    }
    names = {"bos_token": START, "eos_token": END, "unk_token": END, "added_tokens_decoder": added}
    return {
        "first": tiny_model / "tokenizer",
        "second": tiny_model / "tokenizer_2",
        "legacy-first": legacy(tiny_model, root / "1", legacy_config(END), special | {"pad_token": END}),
        "legacy-second": legacy(tiny_model, root / "2", legacy_config("!"), special | {"pad_token": "!"}),
        "legacy-without-map": legacy(tiny_model, root / "3", legacy_config("!")),
        "with-decoder": legacy(tiny_model, root / "4", legacy_config("!") | names, special | {"pad_token": "!"}),
    }


def prompts() -> list[str]:
    """Random texts, and some of which each form is known to make something else."""
    chance = random.Random(7)
    texts = ["", " ", "!", "a!b", f"red {END} sea", f"{START}{END.upper()}", "red sea " * 60, "🙂" * 40]
    for _ in range(400):
        pieces = (
            chance.choice(PIECES) if chance.random() < 0.9 else chr(chance.choice([chance.randrange(0xD800), 0x1F680]))
            for _ in range(chance.choice([1, 2, 5, 20, 90]))
        )
        texts.append("".join(pieces))
    return texts


@pytest.mark.parametrize(
    "form", ["first", "second", "legacy-first", "legacy-second", "legacy-without-map", "with-decoder"]
)
def test_ids_and_their_count_are_those_of_transformers(folders: dict[str, Path], form: str) -> None:
    """Guards all of `ClipTokenizer`: the normalizer, the words, added tokens, cutting and filling."""
    logging.set_verbosity_error()
    theirs, ours = CLIPTokenizer.from_pretrained(folders[form]), ClipTokenizer.read(folders[form])
    for text in prompts():
        expected = theirs(text, padding="max_length", max_length=theirs.model_max_length, truncation=True).input_ids
        assert ours.ids(text) == expected, repr(text)
        assert ours.count(text) == len(theirs(text).input_ids), repr(text)
    assert ours.limit == theirs.model_max_length


def test_the_forms_differ_so_that_the_comparison_means_something(folders: dict[str, Path]) -> None:
    first, second = (ClipTokenizer.read(folders[form]) for form in ("legacy-first", "legacy-second"))
    assert first.ids("a") != second.ids("a")
    assert first.ids("a!")[:4] != second.ids("a!")[:4]
    assert ClipTokenizer.read(folders["first"]).ids(START.upper()) != second.ids(START.upper())


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("tokenizer_config.json", {"model_max_length": 248}),
        ("tokenizer_config.json", {"padding_side": "left"}),
        ("tokenizer_config.json", {"add_bos_token": True}),
        ("tokenizer_config.json", {"extra_special_tokens": ["<cat>"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": described("<cat>")}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": described("!", lstrip=True)}}),
        ("special_tokens_map.json", {"mask_token": "<mask>"}),
        ("added_tokens.json", {"<cat>": 5}),
    ],
    ids=["length", "side", "ends", "extra", "added", "stripping", "mask", "textual-inversion"],
)
def test_a_tokenizer_that_does_anything_else_is_unknown(
    tiny_model: Path, tmp_path: Path, file: str, changes: dict[str, Any]
) -> None:
    """Guards `Fields` and `_added` in `consumer.engine.fast.tokens`."""
    folder = legacy(tiny_model, tmp_path / "other", legacy_config("!"), {})
    ClipTokenizer.read(folder)
    path = folder / file
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))
    with pytest.raises(UnknownModel):
        ClipTokenizer.read(folder)


def test_a_stored_tokenizer_that_cuts_by_itself_is_unknown(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text((tiny_model / "tokenizer" / "tokenizer_config.json").read_text())
    stored = json.loads((tiny_model / "tokenizer" / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 20, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(UnknownModel, match=r"tokenizer\.json"):
        ClipTokenizer.read(tmp_path)
