"""A bundle: the parameters that one module needs during its forward, and the forms they take on the way to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .disk_map import DiskMap, SourceError, locate
from .gather import gathered_bytes, inner_tensors, is_wrapper, like
from .int8_weight import PART_BYTES, Int8Weight

if TYPE_CHECKING:
    from .block import Block

Patch = Callable[[torch.Tensor], torch.Tensor]


class Param:
    """One parameter of a bundle.

    idle: what stands in the module while the parameter is not borrowed: the source's own tensor.
    form: template of what stays in the VBAR (the model's dtype). compute_dtype: what the op is given, None for the
    form's. op_dtype: what the op itself casts to; it costs memory, and is nobody else's business. int8: the finished
    form is an INT8 weight with that many scales a row; 0: it is not.
    """

    __slots__ = (
        "attr",
        "compute_dtype",
        "form",
        "idle",
        "int8",
        "key",
        "op_dtype",
        "original",
        "owner",
        "patch",
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
        int8: int = 0,
    ) -> None:
        self.owner, self.attr, self.key = owner, attr, key
        self.idle = self.original = idle
        self.source = idle.detach()
        self.int8 = int8
        self.form = self._template(self.source.shape, dtype)
        wanted = compute_dtype if compute_dtype != self.form.dtype and not is_wrapper(self.form) else None
        self.compute_dtype = wanted
        self.op_dtype: torch.dtype | None = None
        self.patch: Patch | None = None
        # Parts that lie in a memory map: (map, offset, bytes).
        self.where = [found for part in inner_tensors(self.source) if (found := locate(part)) is not None]

    def _template(self, shape: torch.Size, dtype: torch.dtype, rank: int = 0) -> torch.Tensor:
        if self.int8:
            return Int8Weight.template(shape, dtype, self.int8, rank)
        if shape == self.source.shape:
            return like(self.source, dtype)
        return torch.empty(shape, dtype=dtype, device="meta")

    def set_patch(self, patch: Patch | None) -> None:
        """Attach a patch; one with a `shape` attribute may give the weight another shape.

        One with a `rank` stays beside an INT8 weight, as its low-rank branch.
        """
        self.patch = patch
        shape = torch.Size(getattr(patch, "shape", self.source.shape))
        rank = getattr(patch, "rank", 0) if self.int8 else 0
        if shape != self.form.shape or rank != getattr(self.form, "rank", 0):
            self.form = self._template(shape, self.form.dtype, rank)

    @property
    def cast(self) -> bool:
        """Whether the form differs from the source's."""
        return bool(self.int8) or (not is_wrapper(self.source) and self.form.dtype != self.source.dtype)

    def usable_in_place(self) -> bool:
        """Whether a CPU op can read the source's own memory."""
        if self.cast or self.patch is not None or self.compute_dtype is not None or self.source.is_meta:
            return False
        return all(
            part.is_contiguous() and part.data_ptr() % part.element_size() == 0 for part in inner_tensors(self.source)
        )


class Bundle:
    """The parameters of one module, laid out in one buffer.

    store: the form of the source; form: the finished form, in the model's dtype and with patches applied.
    """

    def __init__(self, name: str, module: torch.nn.Module, params: Sequence[Param]) -> None:
        self.name = name
        self.module = module
        self.params = list(params)
        self.store = [param.source for param in self.params]
        self.form = [param.form for param in self.params]
        self.store_bytes = gathered_bytes(self.store)
        self.nbytes = gathered_bytes(self.form)
        # Tensors that were made in inference mode do not count writes.
        self._counting = [part for source in self.store for part in inner_tensors(source) if not part.is_inference()]
        self.writes = self.count_writes()  # that the finished form knows of
        self.version = 0  # counts changes of the finished form
        self.pinned_version: int | None = None  # of the finished form that its pin holds
        self.place = "auto"
        self.successor: Bundle | None = None
        # The caster's:
        self.piece: Any = None
        self.signature: Any = None
        self.views: list[torch.Tensor] | None = None
        self.loan: Any = None
        self.depth = 0
        self.block: Block | None = None  # set: the bundle of a whole block of modules
        # (object, attribute, value while idle, value while lent), for hosts whose ops read more than parameters.
        self.lent_attributes: list[tuple[Any, str, Any, Any]] = []
        self.refresh()

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of a dynamic module is a plain one."""

    def refresh(self) -> None:
        """Work out again what follows from the parameters' patches."""
        self.patched = any(param.patch is not None for param in self.params)
        self.plain = not self.patched and not any(param.cast for param in self.params)
        self.in_place = all(param.usable_in_place() for param in self.params)
        self.computes = any(param.compute_dtype is not None for param in self.params)
        # Worth keeping: what it costs to make once is more than what it costs to bring.
        self.made = self.patched or any(param.int8 for param in self.params)

    def touch(self) -> bool:
        """The finished form has changed: nothing that holds the old one is current any more. True: its size changed."""
        self.version += 1
        self.signature = None
        self.views = None
        self.form = [param.form for param in self.params]
        before, self.nbytes = self.nbytes, gathered_bytes(self.form)
        self.refresh()
        return self.nbytes != before

    @property
    def finished(self) -> bool:
        """Whether a pin holds the finished form: one transfer, and nothing to compute."""
        return self.pinned_version == self.version

    def offload_cost(self) -> int:
        """Bytes of temporary memory that one use costs while offloaded.

        The bundle itself, and the larger of its cast or dequantised form and, where patches wait, twice the weight in
        the dtype that the model computes in. Once a pin holds the finished form, that alone.
        """
        if self.finished:
            return self.nbytes
        extra = 0
        for param in self.params:
            if param.int8:  # quantised in parts; nothing casts it afterwards
                patched = 2 * param.source.numel() * 4 if param.patch is not None else 0
                parts = 3 * min(PART_BYTES, 4 * param.source.numel())
                extra += gathered_bytes([param.form]) + parts + patched
                continue
            shape_numel = param.source.numel()
            form_bytes = shape_numel * param.form.dtype.itemsize
            dequantised = form_bytes if (param.cast or is_wrapper(param.source)) else 0
            for cast in (param.compute_dtype, param.op_dtype):
                if cast is not None and (cast != param.form.dtype or is_wrapper(param.source)):
                    dequantised = max(dequantised, shape_numel * cast.itemsize)
            extra += max(dequantised, 2 * max(form_bytes, dequantised) if param.patch is not None else 0)
        return self.store_bytes + extra

    def install(self, tensors: Sequence[torch.Tensor]) -> None:
        """Put borrowed tensors in the module's place of its parameters."""
        # Not strict: for every layer call, that would cost as much as the rest of this loop.
        for param, tensor in zip(self.params, tensors):  # noqa: B905
            param.owner._parameters[param.attr] = tensor  # type: ignore[assignment]
        for target, name, _, lent in self.lent_attributes:
            setattr(target, name, lent)

    def restore(self) -> None:
        """Put the idle parameters back."""
        for param in self.params:
            param.owner._parameters[param.attr] = param.idle
        for target, name, idle, _ in self.lent_attributes:
            setattr(target, name, idle)

    def check_present(self) -> None:
        """Raises SourceError where a parameter has no data."""
        for param in self.params:
            if param.source.is_meta:
                raise SourceError(
                    f"'{param.key}' ({tuple(param.source.shape)}) is needed by {type(self.module).__name__} "
                    f"'{self.name}', but the file has no such tensor. It is incomplete or of another architecture."
                )

    def count_writes(self) -> int:
        """A number that grows with every write of torch into a source."""
        total = 0
        for part in self._counting:
            total += part._version
        return total

    def drop_pages(self) -> None:
        """Give the pages of the memory map behind this bundle back to the system."""
        for param in self.params:
            for disk_map, offset, nbytes in param.where:
                disk_map.drop(offset, nbytes)

    def read_ahead(self) -> None:
        """Ask the system to read this bundle's part of the map."""
        for param in self.params:
            for disk_map, offset, nbytes in param.where:
                disk_map.will_need(offset, nbytes)

    def maps(self) -> set[DiskMap]:
        """The maps that the bundle reads from."""
        return {where[0] for param in self.params for where in param.where}
