"""Prompts as token ids: CLIP's byte-level BPE as `transformers.CLIPTokenizer` runs it, without transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from consumer.engine.fast.fields import Fields, UnknownModel
from consumer.engine.fast.files import read_json

# transformers' own, of version 5
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")  # in the order in which they are added
_END = "<|endoftext|>"
_DEFAULTS = {"bos_token": "<|startoftext|>", "eos_token": _END, "unk_token": _END, "pad_token": _END}
_UNREAD = (  # by transformers 5, as far as ids are concerned
    *("clean_up_tokenization_spaces", "errors", "backend", "name_or_path", "is_local", "local_files_only"),
    *("processor_class", "special_tokens_map_file", "tokenizer_file", "tokenizer_class", "do_lower_case"),
)


class ClipTokenizer:
    """One of SDXL's two tokenizers. `limit`: to how many ids prompts are cut and filled, their ends included."""

    def __init__(self, model: BPE, added: Mapping[str, AddedToken], limit: int) -> None:
        self.limit = limit
        self._tokenizer = Tokenizer(model)
        self._tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        self._tokenizer.add_tokens(list(added.values()))
        self._first, self._last, self._padding = (
            self._tokenizer.encode(added[name].content, add_special_tokens=False).ids[0]
            for name in ("bos_token", "eos_token", "pad_token")
        )

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads `tokenizer_config.json` and either `tokenizer.json` or `vocab.json` and `merges.txt`.

        Raises UnknownModel, OSError, and ValueError for what is no JSON.
        """
        config = read_json(folder / "tokenizer_config.json")
        fields = Fields(folder.name, config)
        fields.ignore(*_UNREAD)
        fields.take("padding_side", "right")
        fields.take("truncation_side", "right")
        for key in ("add_prefix_space", "split_special_tokens"):
            fields.take(key, False, None)
        for key in ("additional_special_tokens", "extra_special_tokens"):
            fields.take(key, [], {}, None)
        limit = fields.require("model_max_length", 77)
        fields.ignore(*_NAMED, "added_tokens_decoder")
        fields.end()
        stored = read_json(folder / "tokenizer.json") if (folder / "tokenizer.json").exists() else {}
        added = _added(folder, config, stored)
        return cls(_model(folder, stored, added["unk_token"].content), added, limit)

    def count(self, text: str) -> int:
        """How many ids the whole text has, its two ends included."""
        return len(self._ids(text)) + 2

    def ids(self, text: str) -> list[int]:
        """`limit` ids: the text between its ends, cut or filled."""
        ids = [self._first, *self._ids(text)[: self.limit - 2], self._last]
        return ids + [self._padding] * (self.limit - len(ids))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _model(folder: Path, stored: Mapping[str, Any], unknown: str) -> BPE:
    if stored:
        if stored["model"].get("type") != "BPE" or stored.get("truncation") or stored.get("padding"):
            raise UnknownModel(f"{folder.name}: tokenizer.json is not as CLIP's")
        vocabulary = stored["model"]["vocab"]
        stored_merges = stored["model"]["merges"]
        merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in stored_merges]
    else:
        vocabulary, merges = BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    return BPE(
        vocab=vocabulary,
        merges=merges,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
        unk_token=unknown,
    )


def _added(folder: Path, config: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, AddedToken]:
    """The named tokens as they are added. Raises UnknownModel for others, as those of textual inversions."""
    named: dict[str, Any] = _DEFAULTS | {name: config[name] for name in _NAMED if config.get(name)}
    if "added_tokens_decoder" in config:
        described = {token["content"]: token for token in config["added_tokens_decoder"].values()}
    else:
        if (folder / "special_tokens_map.json").exists():
            named |= read_json(folder / "special_tokens_map.json")
        if (folder / "added_tokens.json").exists():
            raise UnknownModel(f"{folder.name}: it has tokens of its own")
        described = {token["content"]: token for token in stored.get("added_tokens", ())}
    contents = {_content(token) for token in named.values()}
    if set(named) != set(_NAMED) or not set(described) <= contents:
        raise UnknownModel(f"{folder.name}: it has tokens of its own")
    return {name: _token(folder.name, described.get(_content(named[name]), named[name])) for name in _NAMED}


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _token(part: str, token: Any) -> AddedToken:
    if not isinstance(token, dict):
        return AddedToken(token, special=True)
    fields = Fields(part, token)
    content = fields.require("content", token.get("content"))
    normalized = fields.take("normalized", True, False)
    for key in ("lstrip", "rstrip", "single_word"):
        fields.take(key, False)
    fields.ignore("id", "special", "__type")
    fields.end()
    return AddedToken(content, normalized=normalized, special=True)
