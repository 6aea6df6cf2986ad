"""What stands in a module in the place of a weight that is not lent: a tensor that is lent for whatever reads it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only

from ..files.disk_map import check_files
from ..gather import inner_tensors, is_wrapper, memory_of
from ..gguf.weight import numbers_of, stays_quantised
from ..joined_weight import JoinedWeight
from .lookup import Asked, asked_for, with_rows
from .param import Param


class Owner(Protocol):
    """The bundle of a parameter, as far as a read knows it. The fields: see bundle.py."""

    lender: Any
    params: list[Param]
    by_rows: bool
    depth: int
    coming: Any


# Operations that make a view, in their order: each with its arguments after the tensor, and which result was taken.
Steps = tuple[tuple[Any, tuple[Any, ...], dict[str, Any], int | None], ...]


class IdleWeight(torch.Tensor):
    """A parameter, or a view of one, that has no memory and says of itself what an op would be lent.

    An operation on it gets the weight in its final form, patched, on the device, lent for that operation alone. A write
    goes into the source. A copy is an ordinary parameter with the numbers of the source.
    """

    bundle: Owner
    param: Param
    shown: torch.Tensor
    steps: Steps
    gives_source = False  # to an operation, in place of the final form

    @staticmethod
    def __new__(
        cls: type[IdleWeight],
        bundle: Owner,
        param: Param,
        device: torch.device,
        shown: torch.Tensor | None = None,
        steps: Steps = (),
        inner: int | None = None,
    ) -> IdleWeight:
        """shown: a tensor without memory of the same shape, strides and dtype. steps: how the view is made.

        inner: which of a quantised weight's tensors it is; None for the weight.
        """
        with torch.inference_mode(False):
            if shown is None:
                shown = torch.empty(param.final.shape, dtype=param.compute_dtype or param.final.dtype, device="meta")
            self: IdleWeight = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                shown.shape,
                strides=shown.stride(),
                storage_offset=shown.storage_offset(),
                dtype=shown.dtype,
                device=device,
                requires_grad=False,
            )
        self.bundle, self.param, self.shown, self.steps, self.inner = bundle, param, shown, steps, inner
        return self

    @contextmanager
    def lent(self) -> Iterator[torch.Tensor]:
        """Lend the weight for one operation. Once its model is closed, give the source."""
        kept = self.param.idle is self.param.original if self.inner is None else not self.bundle.depth
        if kept or self.gives_source:  # kept by somebody, from a model that is closed or a call that has ended
            yield self.view_of(self.stored().to(self.device, self.dtype))
            return
        with self.bundle.lender.read(self.bundle) as tensors:
            yield self.view_of(self._of(tensors[self.bundle.params.index(self.param)]))

    def stored(self) -> torch.Tensor:
        """Return the tensor of the source that the weight is a view of, to be read. Wait until it has come."""
        source = self.in_source()
        check_files(memory_of(source))
        return source

    def in_source(self) -> torch.Tensor:
        """Return that tensor to ask where it lies and what it looks like."""
        return self._of(self.param.source)

    def _of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.inner is None else inner_tensors(tensor)[self.inner]

    def like(self, shown: torch.Tensor, *steps: Any) -> IdleWeight:
        """Return a view, or a cast, of this weight that is idle too."""
        view = IdleWeight(self.bundle, self.param, self.device, shown, (*self.steps, *steps), self.inner)
        view.gives_source = self.gives_source
        return view

    def view_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Make the same view of a tensor that this one is of its parameter."""
        for func, args, kwargs, index in self.steps:
            tensor = func(tensor, *args, **kwargs)
            if index is not None:
                tensor = tensor[index]
        return tensor

    # Torch reads the memory of a tensor directly for these.
    def numpy(self, **options: Any) -> Any:
        return self.clone().numpy(**options)

    def tolist(self) -> Any:
        return self.clone().tolist()

    def __deepcopy__(self, memo: dict) -> torch.nn.Parameter:
        stored = self.view_of(self.stored())
        # A plain tensor is copied without Python's lock, which whoever finds a file cut short needs (`lost_pages.py`).
        made = copy.deepcopy(stored, memo) if is_wrapper(stored) else stored.clone()
        copied = torch.nn.Parameter(made, requires_grad=False)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return torch.nn.Parameter(self.view_of(self.stored()), requires_grad=False).__reduce_ex__(protocol)

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"IdleWeight('{self.param.key}', {tuple(self.shape)}, {self.dtype}, {self.device})"

    # -- torch's protocol for subclasses

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            written = _written(func, args, kwargs)
            if written is not None:
                return _write(written, func, args, kwargs)
        asked = asked_for(func, args)
        if asked is not None:
            tables = {at: args[at] for at in asked.tables if args[at].numel() > 1}
            if _have_rows(tables.values()):
                return _look_up(tables, asked, func, args, kwargs)
        if func.overloadpacket in _CASTS:
            cast = _cast(func, args, kwargs)
            if cast is not None:
                return cast
        may_alias = any(value.alias_info is not None for value in func._schema.returns)
        if may_alias and args and isinstance(args[0], IdleWeight) and func.overloadpacket not in _CONVERSIONS:
            view = _view(args[0], func, args[1:], kwargs)
            if view is not None:
                return view
        with ExitStack() as loans:
            args, kwargs = tree_map_only(IdleWeight, lambda idle: loans.enter_context(idle.lent()), (args, kwargs))
            result = tree_map_only(torch.Tensor, numbers_of, func(*args, **kwargs))
            # A view would be one of memory that goes back when the loan ends.
            return tree_map_only(torch.Tensor, torch.clone, result) if may_alias else result


# They return the tensor itself only where there is nothing to convert.
_CONVERSIONS = frozenset((torch.ops.aten.to,))
_CASTS = frozenset((torch.ops.aten.to, torch.ops.aten._to_copy))
_CAST = torch.ops.aten._to_copy.default
_THE_SAME = frozenset((torch.ops.aten.detach.default, torch.ops.aten.alias.default))


def _have_rows(tables: Collection[torch.Tensor]) -> bool:
    """Say whether all of them are idle weights of one table, of which lookups bring rows, as they are or cast.

    A tensor of numbers among them would be asked for rows of the others.
    """
    idle = [table for table in tables if isinstance(table, IdleWeight)]
    owners = {table.bundle for table in idle}
    if len(idle) != len(tables) or len(owners) != 1 or not owners.pop().by_rows:
        return False
    return all(func is _CAST for table in idle for func, *_ in table.steps) and not any(t.gives_source for t in idle)


def _look_up(tables: dict[int, IdleWeight], asked: Asked, func: Any, args: Any, kwargs: Any) -> Any:
    """Do an operation that looks rows up, with those rows alone."""
    bundle = next(iter(tables.values())).bundle
    with bundle.lender.rows(bundle, list(tables.values()), asked) as (rows, places):
        return func(*with_rows(func, args, dict(zip(tables, rows, strict=True)), places), **kwargs)


def _cast(func: Any, args: Any, kwargs: Any) -> IdleWeight | None:
    """Return a cast of a table that is idle too, while its module is called: the rows are cast once they are here.

    None for whatever is no such cast. Elsewhere a cast is a copy, which a later write must not change.
    """
    idle = args[0]
    if not isinstance(idle, IdleWeight) or not (idle.bundle.by_rows and idle.bundle.depth):
        return None
    names = (argument.name for argument in func._schema.arguments)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    dtype, device = given.get("dtype"), given.get("device")
    if dtype is None or "other" in given or (device is not None and torch.device(device) != idle.device):
        return None
    return idle.like(idle.shown.to(dtype), (_CAST, (), {"dtype": dtype}, None))


def _view(idle: IdleWeight, func: Any, args: Any, kwargs: Any) -> Any:
    """Return the view that the operation makes of an idle weight, itself idle. None where it makes no view."""
    if func in _THE_SAME:
        return idle.like(idle.shown)
    shown = func(idle.shown, *args, **kwargs)
    results = shown if isinstance(shown, (list, tuple)) else [shown]
    memory = idle.shown.untyped_storage()._cdata
    if not all(isinstance(result, torch.Tensor) and result.untyped_storage()._cdata == memory for result in results):
        return None
    views = [
        idle.like(result, (func, args, kwargs, None if result is shown else index))
        for index, result in enumerate(results)
    ]
    return views[0] if results[0] is shown else views


def _written(func: Any, args: Any, kwargs: Any) -> IdleWeight | None:
    """Return the idle weight that the operation writes into, or None."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if isinstance(value, IdleWeight):
                return value
    return None


def _write(written: IdleWeight, func: Any, args: Any, kwargs: Any) -> IdleWeight:
    """Write into the source, of which the final form is made again. Other idle weights are read as sources too."""
    source = written.param.source
    place = source.device
    # A view of a weight in pieces would be one of a copy. The copy is written into, and then the pieces.
    whole = written.stored().whole() if isinstance(source, JoinedWeight) else None  # type: ignore[attr-defined]

    def beside(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, IdleWeight):
            return tensor.to(place)
        in_pieces = whole is not None and tensor.param is written.param
        return tensor.view_of(whole if in_pieces else tensor.stored())  # type: ignore[arg-type]

    args, kwargs = tree_map_only(torch.Tensor, beside, (args, kwargs))
    func(*args, **kwargs)
    if whole is not None:
        source.assign(whole)  # type: ignore[attr-defined]
        return written
    if not source.is_inference():
        torch.autograd.graph.increment_version(source)  # torch counts no writes below a subclass
    return written


def as_stored(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor that holds the numbers: the source of an idle weight, else the tensor itself.

    Whoever reads them checks the tensor's file first.
    """
    return tensor.view_of(tensor.in_source()) if isinstance(tensor, IdleWeight) else tensor


# Set while code reads state dicts in order to compute with them.
_computing = ContextVar("computing", default=False)


@contextmanager
def state_dicts_to_compute_with() -> Iterator[None]:
    """Let state dicts of modules hold idle weights, which are lent to whatever reads them, while the block runs."""
    token = _computing.set(True)
    try:
        yield
    finally:
        _computing.reset(token)


def store_sources(module: torch.nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Put weights into a state dict as they are stored: it is read to be saved, or for its names and shapes.

    One whose file is still coming stays idle, and gives what is stored to whoever reads it.
    """
    for attr, parameter in module._parameters.items():
        if isinstance(parameter, IdleWeight) and not _computing.get():
            param = parameter.param
            state[f"{prefix}{attr}"] = param.source
            if parameter.bundle.coming and param.coming():
                state[f"{prefix}{attr}"] = _of_source(parameter.bundle, param)


def _of_source(bundle: Owner, param: Param) -> IdleWeight:
    """Return a weight that waits for its source, and gives it, when it is read."""
    source = param.source
    shown = torch.empty(source.shape, dtype=source.dtype, device="meta")
    idle = IdleWeight(bundle, param, source.device, shown)
    idle.gives_source = True
    return idle


def stands_itself(param: Param, device: torch.device | None) -> bool:
    """Say whether any code may read the source where it lies."""
    return device is None and param.usable_in_place() and not param.coming()


def idle_form(bundle: Owner, param: Param, device: torch.device | None) -> torch.Tensor:
    """Return what stands in the module while nothing is lent. device: None where ops use the source's own memory.

    A quantised weight is read by ops that know it, and stays as it is. So does one that has no data.
    """
    if stays_quantised(param.source) or param.source.is_meta or stands_itself(param, device):
        return param.original
    idle = IdleWeight(bundle, param, device or param.source.device)
    idle._is_param = True  # torch takes it for an `nn.Parameter`
    return idle
