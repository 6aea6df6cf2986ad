"""A GGUF file as a source of weights: its blocks are views of its memory map."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

from ..files.disk_map import DiskMap, TensorSpec, check_overlap, kept_names
from ..files.safetensors_header import SourceError
from .dequantise import function_for
from .header import NUMBERS, STRING, GgufEntry, LongList, parse_header
from .names import renaming
from .text_encoder import OWN_NAMES, SPIECE, TEXT_ENCODERS, TOWER, VISION_TOWER, WITH_TOWER
from .tokenizer import spiece_model, tekken_model
from .vision import as_one, find_vision
from .weight import Form, GgufWeight

Rename = Callable[[str], str]
TABLES = ("shared.weight", "model.embed_tokens.weight")


class GgufMap(DiskMap):
    """A GGUF file. What is quantised there comes as GgufWeight, the rest as ordinary tensors. Names are the model's.

    dtype: that the quantised weights stand for. Where None, fp16 in a file that has tensors of it and none of bf16,
    else bf16.
    """

    def _describe(
        self, file: BinaryIO, keep: Callable[[str], bool] | None, rename: Callable[[str], str] | None
    ) -> dict[str, TensorSpec]:
        header = parse_header(self.path, file)
        self.file_bytes = header.file_bytes
        self.metadata = {key: value for key, value in header.metadata.items() if isinstance(value, str)}
        self.gguf_metadata = header.metadata
        self.left_out = []
        self.blocks: dict[str, GgufEntry] = {}
        self.architecture = self.metadata.get("general.architecture", "")
        self.encoder = VISION_TOWER if self.architecture == TOWER else TEXT_ENCODERS.get(self.architecture)
        by_model = renaming(self.encoder.names) if self.encoder is not None else None
        specs: dict[str, TensorSpec] = {}
        for key, name in kept_names(self.path, header.entries, keep, _both(by_model, rename)):
            entry = header.entries[key]
            if entry.kind.dtype is None or (len(entry.shape) == 2 and self._heads(name)):
                self.blocks[name] = entry
                shape: tuple[int, ...] = (entry.nbytes // entry.kind.nbytes, entry.kind.nbytes)
                specs[name] = TensorSpec(torch.uint8, shape, entry.offset, entry.nbytes)
            else:
                specs[name] = TensorSpec(getattr(torch, entry.kind.dtype), entry.shape, entry.offset, entry.nbytes)
        check_overlap(self.path, specs)
        kinds = {entry.kind.name for entry in header.entries.values()}
        self.stands_for = torch.float16 if "F16" in kinds and "BF16" not in kinds else torch.bfloat16
        return specs

    def _heads(self, name: str) -> int:
        """Return how many heads have their rows in pairs in the weight of that name; 0 where none have."""
        if self.encoder is None or not self.encoder.paired:
            return 0
        for projection, key in ((".q_proj.weight", "head_count"), (".k_proj.weight", "head_count_kv")):
            if name.endswith(projection):
                heads = self.gguf_metadata.get(f"{self.architecture}.attention.{key}")
                if type(heads) is not int or heads < 1:
                    raise SourceError(
                        f"{self.path}: '{self.architecture}.attention.{key}' should be a number of heads, and is "
                        f"{heads!r}. The order of the rows of '{name}' is not known without it. Get the file from "
                        "another maker."
                    )
                return heads
        return 0

    def tensor(self, key: str) -> torch.Tensor:
        view = super().tensor(key)
        entry = self.blocks.get(key)
        if entry is not None:
            heads = self._heads(key)
            if heads and entry.shape[0] % (2 * heads):
                raise SourceError(
                    f"{self.path}: '{key}' has {entry.shape[0]} rows, which {heads} heads do not divide. The file is "
                    "damaged: download or copy it again."
                )
            return GgufWeight(view, Form(entry.kind.name, entry.shape, self.dtype or self.stands_for, heads))
        if self.encoder is not None and view.dim() < 2 and view.dtype == torch.float32:
            spec = self.spec(key)
            self.check(spec.offset, spec.nbytes)
            if self.encoder.grown and key.endswith("norm.weight"):
                view = view - 1
            # llama.cpp writes norms in fp32. ComfyUI would take that for the dtype of the whole encoder.
            return view.to(self.stands_for)
        return view

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return all tensors, and the tokenizer of a text encoder whose loader has none of its own.

        Those of `parts` are among them. Raises SourceError for types of blocks that this Python has nothing for: it
        would be too late for that in the middle of a run.
        """
        for kind in sorted({entry.kind.name for entry in self.blocks.values()}):
            try:
                function_for(kind)
            except SourceError as error:
                raise SourceError(f"{self.path}: {error}") from None
        tensors = super().state_dict()
        if self.architecture == TOWER:
            tensors = as_one(tensors)
        for part in self.parts:
            tensors.update(part.state_dict())
        if self.encoder is not None:
            rows = next((tensors[name].shape[0] for name in TABLES if name in tensors), 0)
            wanted = self.encoder.tokenizer(rows, self.metadata.get("tokenizer.ggml.pre", ""))
            if wanted:
                made = self._spiece_model() if wanted == SPIECE else self._tekken_model()
                tensors[wanted] = torch.frombuffer(bytearray(made), dtype=torch.uint8)
        return tensors

    # -- the tokenizer

    def _spiece_model(self) -> bytes:
        tokens, types, scores = self._texts("tokens"), self._integers("token_type"), self._numbers("scores")
        charsmap = self.gguf_metadata.get("tokenizer.ggml.precompiled_charsmap")
        normalisation = bytes(byte & 0xFF for byte in self._integers("precompiled_charsmap")) if charsmap else b""
        if not len(tokens) == len(types) == len(scores):
            raise self._no_tokenizer(f"has {len(tokens)} tokens, {len(types)} types and {len(scores)} scores of them")
        if not all(0 < kind < 7 for kind in types):
            raise self._no_tokenizer("has types of tokens that are not known")
        try:
            return spiece_model(self.gguf_metadata, tokens, scores, types, normalisation)
        except OverflowError:  # of a score in fp64
            raise self._no_tokenizer("has scores that are too large") from None

    def _tekken_model(self) -> bytes:
        try:
            return tekken_model(self._texts("tokens"), self._integers("token_type"))
        except (KeyError, UnicodeDecodeError):
            raise self._no_tokenizer("has tokens that are not written as bytes") from None

    def _no_tokenizer(self, words: str) -> SourceError:
        return SourceError(
            f"{self.path}: its tokenizer {words}, so a text cannot be turned into this encoder's tokens. Get a file "
            "that llama.cpp's converter wrote, or the encoder's safetensors file."
        )

    def _list(self, name: str) -> Any:
        found = self.gguf_metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(found, (list, LongList)):
            raise self._no_tokenizer(f"lacks the list '{name}'")
        return found

    def _numbers(self, name: str) -> list[Any]:
        found = self._list(name)
        if not isinstance(found, LongList):
            if not all(isinstance(value, (int, float)) for value in found):
                raise self._no_tokenizer(f"has other values than numbers in the list '{name}'")
            return list(found)
        if found.kind == STRING:
            raise self._no_tokenizer(f"has texts in the list '{name}'")
        raw = self._map[found.offset : found.offset + found.nbytes]
        return list(struct.unpack(f"<{found.length}{NUMBERS[found.kind]}", raw))

    def _integers(self, name: str) -> list[int]:
        found = self._numbers(name)
        if not all(isinstance(value, int) for value in found):
            raise self._no_tokenizer(f"has other values than whole numbers in the list '{name}'")
        return found

    def _texts(self, name: str) -> list[bytes]:
        found = self._list(name)
        if not isinstance(found, LongList):
            return [str(value).encode() for value in found]
        if found.kind != STRING:
            raise self._no_tokenizer(f"has numbers in the list '{name}'")
        raw, at, texts = self._map[found.offset : found.offset + found.nbytes], 0, []
        for _ in range(found.length):
            (length,) = struct.unpack_from("<Q", raw, at)
            texts.append(raw[at + 8 : at + 8 + length])
            at += 8 + length
        return texts


def _both(first: Rename | None, second: Rename | None) -> Rename | None:
    """Return what renames by the one, then by the other."""
    if first is None or second is None:
        return first or second
    return lambda key: second(first(key))


def check_text_encoder(source: object) -> None:
    """Raise SourceError for a GGUF file whose text encoder cannot be made of what is in it."""
    if not isinstance(source, GgufMap) or source.architecture in (*TEXT_ENCODERS, *OWN_NAMES):
        return
    raise SourceError(
        f"{source.path}: text encoders of architecture '{source.architecture}' are not read from GGUF files. Known: "
        f"{', '.join(TEXT_ENCODERS)}, and files that keep the model's own names. Use the encoder's safetensors file."
    )


def add_vision(source: object) -> str:
    """Add the vision tower that lies beside an encoder, and return its name. '' for an encoder without one."""
    if not isinstance(source, GgufMap) or source.architecture != WITH_TOWER:
        return ""
    found = find_vision(source.path)
    if found is None:
        return ""
    tower = GgufMap(found)
    if tower.architecture != TOWER:
        return ""
    source.parts = (tower,)
    return found.name
