"""One parameter of a bundle: where its numbers come from, and what they look like when an op gets them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..files.disk_map import extent, locate
from ..files.mapped_file import MappedFile
from ..gather import inner_tensors, is_wrapper, like, memory_of
from ..gguf.weight import GgufWeight
from ..joined_weight import JoinedWeight
from ..quantisation import Quantisation
from ..ram.apart import apart

Patch = Callable[[torch.Tensor], torch.Tensor]

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float8_e4m3fn": "fp8_e4m3fn"}
SHORT |= {"float8_e5m2": "fp8_e5m2"}


class Param:
    """Parameter `attr` of module `owner`, under its name `key` in the model.

    original: the tensor that stood in the module before. source: the same data, detached.
    idle: what stands in the module while nothing is lent, see idle_weight.py.
    final: template of the final form, without memory. dtype: the model's, that a patched weight has.
    compute_dtype: dtype that the op is given; None for the final form's. op_dtype: dtype that the op itself casts to,
    which costs temporary memory. quantisation: of a weight that is quantised here; None for others.
    """

    __slots__ = (
        "attr",
        "compute_dtype",
        "dtype",
        "final",
        "idle",
        "key",
        "op_dtype",
        "original",
        "owner",
        "patch",
        "quantisation",
        "source",
        "where",
    )

    def __init__(
        self,
        owner: torch.nn.Module,
        attr: str,
        key: str,
        idle: torch.nn.Parameter,
        dtype: torch.dtype,
        compute_dtype: torch.dtype | None = None,
        quantisation: Quantisation | None = None,
    ) -> None:
        self.owner, self.attr, self.key = owner, attr, key
        self.idle = self.original = idle
        self.source = idle.detach()
        self.quantisation, self.dtype = quantisation, dtype
        self.patch: Patch | None = None
        self.final = self._template(self.source.shape, dtype)
        wanted = compute_dtype if compute_dtype != self.final.dtype and not is_wrapper(self.final) else None
        self.compute_dtype = wanted
        self.op_dtype: torch.dtype | None = None
        # Parts that lie in a memory map, as (map, offset, bytes).
        self.where = [place for part in memory_of(self.source) if (place := locate(part)) is not None]

    def _template(self, shape: torch.Size, dtype: torch.dtype, rank: int = 0) -> torch.Tensor:
        if self.quantisation is not None:
            return self.quantisation.template(shape, dtype, rank)
        if isinstance(self.source, GgufWeight) and (rank or self.patch is None):
            return self.source.template(rank)
        if rank:
            return self.patch.beside(self.source, rank)  # type: ignore[union-attr, no-any-return]
        if isinstance(self.source, GgufWeight):  # a patched weight is not made blocks of again
            return torch.empty(shape, dtype=self.dtype, device="meta")
        if shape == self.source.shape:
            return like(self.source, dtype)
        return torch.empty(shape, dtype=dtype, device="meta")

    def set_patch(self, patch: Patch | None) -> None:
        """Attach a patch, or None. A patch with a `shape` attribute may give the weight another shape.

        A patch with a `rank` stays beside the weight as a low-rank branch of it. Where the weight is neither in blocks
        nor quantised here, the patch's `beside` makes the template of the two.
        """
        self.patch = patch
        shape = torch.Size(getattr(patch, "shape", self.source.shape))
        rank = getattr(patch, "rank", 0)
        of_the_patch = self.quantisation is None and (rank > 0 or isinstance(self.source, GgufWeight))
        if of_the_patch or shape != self.final.shape or rank != getattr(self.final, "rank", 0):
            self.final = self._template(shape, self.final.dtype, rank)

    @property
    def is_cast(self) -> bool:
        """Say whether the final form has other numbers than the source even without a patch."""
        return self.quantisation is not None or (not is_wrapper(self.source) and self.final.dtype != self.source.dtype)

    def coming(self) -> list[tuple[MappedFile, int, int]]:
        """Return the ranges of the source that have yet to come into their files."""
        places = [place for part in memory_of(self.source) if (place := extent(part)) is not None]
        return [(file, offset, nbytes) for file, offset, nbytes in places if not file.has(offset, nbytes)]

    def making_bytes(self) -> int:
        """Return the bytes of temporary memory in which the op makes numbers of a quantised weight. 0 for others.

        A lookup makes hardly any.
        """
        making = getattr(self.final, "making_bytes", None)
        if making is None or isinstance(self.owner, torch.nn.Embedding):
            return 0
        return making(self.op_dtype)  # type: ignore[no-any-return]

    def usable_in_place(self) -> bool:
        """Say whether a CPU op can read the source's own memory."""
        if self.is_cast or self.patch is not None or self.compute_dtype is not None or self.source.is_meta:
            return False
        if isinstance(self.source, JoinedWeight):
            return False
        return all(
            part.is_contiguous() and part.data_ptr() % part.element_size() == 0 for part in inner_tensors(self.source)
        )

    def only_cast(self) -> bool:
        """Say whether all that the final form needs is another number format."""
        plain = self.patch is None and self.quantisation is None and self.compute_dtype is None
        odd = self.source.is_meta or is_wrapper(self.source) or isinstance(self.source, JoinedWeight)
        return plain and not odd

    def as_final(self) -> torch.Tensor:
        """Return a copy of the source, which is only to be cast, in the final form."""
        made = apart(lambda: torch.empty(self.source.shape, dtype=self.final.dtype, device=self.source.device))
        return made.copy_(self.source)


def number_format(param: Param) -> str:
    """Name the format that a weight stays in, for people: 'bf16', 'int8', 'Q4_K'."""
    if param.quantisation is not None:
        return param.quantisation.name
    if isinstance(param.source, GgufWeight):
        return param.source.form.kind
    part = inner_tensors(param.source)[0] if is_wrapper(param.source) else param.final
    name = str(part.dtype).removeprefix("torch.")
    return SHORT.get(name, name)
