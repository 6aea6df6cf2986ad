"""A bundle: the parameters that one module needs during its forward, and the state that they are in.

    state        slice     signature   pin            the next use costs
    absent       none      -           none           read, gather, transfer, cast, patch
    pinned raw   none      -           version None   one transfer, then cast and patch
    pinned       none      -           == version     one transfer of the final form
    stale        granted   != last     any            brought once, then resident
    resident     granted   == last     any            nothing: the views are lent

`slice` and `signature` are the VBAR's answer to `fault`, which is asked at each use. A refused fault changes no state.
Each transition is one method of `Bundle`, and these are its callers:

    move_to            any -> absent or stale    Residency, when it lays addresses out
    left               any -> absent             Residency, when it gives its addresses back
    became_resident    stale -> resident         the caster, when the final form lies in the slice
    evicted            resident -> stale         the VBAR, from any thread, when it takes a slice's memory back
    pin_changed        absent <-> pinned         Pins, when a pin comes or goes
    invalidate         version + 1; resident -> stale, pinned -> absent      DynamicModel, when patches change
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from ..device.backend import Backend
from ..files.disk_map import DiskMap, SourceError
from ..gather import gathered_bytes, is_wrapper, memory_of
from ..gguf.weight import GgufWeight
from ..ledger import Ledger
from .idle_weight import idle_form, store_sources
from .param import Param
from .repeat import may_repeat

LITTLE = 16  # a bundle of which no more than one in so many bytes is cast is used where it lies


class Lending(Protocol):
    """A loan that has begun, and who ends it."""

    backend: Backend

    def exit(self, bundle: Bundle) -> None:
        """Put the idle parameters back and end the loan."""

    def make_room(self, bundle: Bundle, error: BaseException, again: bool = True) -> bool:
        """Evict the bundles that are not in use, where the error of a forward says out of memory.

        again: the forward may run once more. Returns `again` where memory was freed, else False.
        """

    def explain(self, bundle: Bundle, error: BaseException) -> None:
        """Raise an error that names the limit in place of one of a forward that says that memory was refused."""


class Lender(Protocol):
    """Whoever brings a bundle's tensors. Layers and blocks know nothing else of how weights travel."""

    ledger: Ledger

    def enter(self, bundle: Bundle) -> Lending:
        """Bring the tensors and let them stand in the module. Return the Lending that ends the loan."""

    def read(self, bundle: Bundle) -> AbstractContextManager[Sequence[torch.Tensor]]:
        """Lend the tensors, in the order of the parameters, to an operation outside of the module's forward."""

    def at_hand(self, bundle: Bundle) -> Lending:
        """Lend nothing yet. Return who will lend to the operations of a forward, and makes room for them."""

    def rows(self, table: Any, idle: Any, asked: Any) -> AbstractContextManager[Any]:
        """Lend rows of a table to an operation that looks them up, see lend_rows.py."""


class Bundle:
    """The parameters of one module, laid out in one buffer.

    source: tensors as the file has them. final: templates of the form that the op gets, in the model's dtype and with
    patches applied. nbytes, source_bytes: of the two forms, gathered. lender: set by DynamicModel.
    """

    lender: Lender
    by_rows = False  # whether lookups bring rows, and nothing brings the whole; see table.py

    def __init__(self, name: str, module: torch.nn.Module, params: Sequence[Param]) -> None:
        self.name = name
        self.module = module
        self.params = list(params)
        # Looked up once: this is the greater part of what lending a resident bundle does.
        self._places: list[tuple[Param, dict[str, Any], str]] = [
            (param, param.owner._parameters, param.attr) for param in self.params
        ]
        self.source = [param.source for param in self.params]
        self.final = [param.final for param in self.params]
        self.source_bytes = gathered_bytes(self.source)
        self._files = list(self.maps())
        self.coming = [place for param in self.params for place in param.coming()]  # emptied by `arrive`
        self.nbytes = gathered_bytes(self.final)
        # Tensors of inference mode do not count writes, and asking for their count raises.
        self._counting = [part for source in self.source for part in memory_of(source) if not part.is_inference()]
        self.writes = self.count_writes()  # that the final form knows of; written by follow_writes
        self.version = 0  # counts changes of the final form; written by `invalidate`
        self.pinned_version: int | None = None  # of the final form that its pin holds; written by Pins
        self.offload_to = "auto"  # where its rule keeps it while offloaded; written once, by collect_bundles
        self.successor: Bundle | None = None  # the next bundle to be asked for; written by the caster at each use
        self.vbar_slice: Any = None
        self.signature: Any = None  # of the slice, when the final form was written into it
        self.views: Sequence[torch.Tensor] | None = None  # the final form in the slice
        self.has_passed = False  # a use has made the final form without keeping it; written by HostCaster
        self.loan: Any = None  # written by the caster, as `depth`: set while the bundle is lent
        self.depth = 0
        # (object, attribute, value while idle, value while lent), for ops that read more than parameters; written by
        # ComfyUI's side.
        self.lent_attributes: list[tuple[Any, str, Any, Any]] = []
        self._hooks: list[Any] = []  # of the modules' state dicts
        self.refresh()

    def stand_in(self, device: torch.device | None) -> None:
        """Let the idle parameters be what reads get. device: where ops need them; None where they lie."""
        for param in self.params:
            param.idle = idle_form(self, param, device)
        if not self._hooks:
            owners = dict.fromkeys(param.owner for param in self.params)
            self._hooks = [owner.register_state_dict_post_hook(store_sources) for owner in owners]
        if not self.depth:
            self.restore()

    def let_go(self) -> None:
        """Let the parameters that stood in the module before stand there again."""
        for param in self.params:
            param.idle = param.original
        self.restore()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __deepcopy__(self, memo: dict) -> None:
        """Return None, so that a copy of a dynamic module is an ordinary module."""

    def refresh(self) -> None:
        """Compute the fields that follow from the parameters' patches."""
        self.patched = any(param.patch is not None for param in self.params)
        self.source_is_final = not self.patched and not any(param.is_cast for param in self.params)
        self._lying = [param.usable_in_place() for param in self.params]
        self.in_place = all(self._lying) or self._lies_but_for_little()
        self.casts_at_use = any(param.compute_dtype is not None for param in self.params)
        # The host can make the final form, with the same bits.
        self.only_cast = not self.patched and not any(p.quantisation or is_wrapper(p.source) for p in self.params)
        # Patches change numbers and nothing else, so they may be applied where the source has arrived.
        self.only_patched = not any(
            p.quantisation or p.is_cast or p.compute_dtype or is_wrapper(p.source) or p.final.shape != p.source.shape
            for p in self.params
        )
        # Making the final form costs more than bringing it.
        self.worth_keeping = self.patched or any(param.quantisation for param in self.params)

    def _lies_but_for_little(self) -> bool:
        """Say whether casts of a bias or a scale are all that keeps a CPU op from reading the source's own memory.

        A quantised weight beside a bias in bf16 would else be copied for the sake of the bias.
        """
        cast = [param for param, lies in zip(self.params, self._lying, strict=True) if not lies]
        nbytes = sum(param.source.numel() * param.final.dtype.itemsize for param in cast)
        return any(self._lying) and nbytes * LITTLE <= self.nbytes and all(param.only_cast() for param in cast)

    def where_it_lies(self) -> Sequence[torch.Tensor]:
        """Return the tensors of a bundle that is used in place: the source, with casts in the place of the little."""
        if all(self._lying):
            return self.source
        with torch.inference_mode(False), torch.no_grad():  # what stays resident is used by training nodes too
            return [
                param.source if lies else param.as_final() for param, lies in zip(self.params, self._lying, strict=True)
            ]

    def lies(self, views: Sequence[torch.Tensor] | None) -> bool:
        """Say whether these tensors are the source itself, but for little."""
        if not self.in_place or not views:
            return False
        place = self._lying.index(True)
        return views[place] is self.source[place]

    # -- transitions

    def move_to(self, vbar_slice: Any) -> None:
        """Take a slice of a VBAR, or None for a bundle that is always streamed. An older slice's content is void."""
        self.vbar_slice = vbar_slice
        self.signature = self.views = None

    def left(self) -> None:
        """Note that its model gave the VBAR back."""
        self.move_to(None)
        self.has_passed = False

    def became_resident(self, signature: Any, views: Sequence[torch.Tensor]) -> None:
        """Note that the slice holds the final form for as long as the VBAR answers with this signature."""
        self.signature = signature
        self.views = views

    def missed(self) -> None:
        """Note that the whole was asked for and has no slice to stay in."""

    def evicted(self) -> None:
        """Note that the slice lost its memory. A bundle that is used in place gives its file's pages back."""
        self.views = None
        self.has_passed = False
        if self.in_place:
            self.drop_pages()

    def pin_changed(self, version: int | None) -> bool:
        """Note the version of the final form that the pin holds, None for none. Say whether that is a change."""
        before, self.pinned_version = self.pinned_version, version
        return before != version

    def invalidate(self) -> bool:
        """Let no holder of the old final form count as current. Say whether the bundle needs other addresses."""
        self.version += 1
        self.signature = self.views = None
        self.final = [param.final for param in self.params]
        before, self.nbytes = self.nbytes, gathered_bytes(self.final)
        self.refresh()
        return self.nbytes != before

    @property
    def may_pass(self) -> bool:
        """Say whether a CPU can make the final form for one use alone, see HostCaster: another use costs but a cast."""
        return self.only_cast and not self.in_place and self.offload_to not in ("ram", "pin")

    @property
    def worth_writing_back(self) -> bool:
        """Say whether a pin of the final form saves arithmetic (of patches, of quantisation) or bytes.

        A mere upcast is cheaper to repeat than to transfer.
        """
        return self.worth_keeping or self.nbytes < self.source_bytes

    @property
    def pin_is_current(self) -> bool:
        """Say whether a pin holds the final form. The next use then costs one transfer and no computation."""
        return self.pinned_version == self.version

    # -- cost

    def offload_cost(self) -> int:
        """Return the bytes of temporary memory that one use costs while offloaded.

        They hold the source, and the larger of its cast or dequantised form and, where patches wait, twice the weight
        in the dtype that the model computes in. With a current pin they hold the final form and what an op casts it to.
        """
        if self.pin_is_current:
            return self.nbytes + self.cast_bytes()
        extra = 0 if self.source_is_final else self.nbytes
        for param in self.params:
            numel = param.source.numel()
            if param.quantisation is None and hasattr(param.final, "down"):  # numbers are made by the op alone
                continue
            if isinstance(param.source, GgufWeight):
                extra += param.source.making_bytes()
            if param.quantisation is not None:  # quantised in parts; nothing casts it afterwards
                extra += param.final.quantising_bytes(param.source) + (2 * numel * 4 if param.patch is not None else 0)
                continue
            final_bytes = numel * param.final.dtype.itemsize
            dequantised = final_bytes if (param.is_cast or is_wrapper(param.source)) else 0
            for cast in (param.compute_dtype, param.op_dtype):
                if cast is not None and (cast != param.final.dtype or is_wrapper(param.source)):
                    dequantised = max(dequantised, numel * cast.itemsize)
            needed = max(dequantised, 2 * max(final_bytes, dequantised) if param.patch is not None else 0)
            extra += max(0, needed if self.source_is_final else needed - final_bytes)
        return self.source_bytes + extra + self._making_bytes()

    @property
    def transfer_bytes(self) -> int:
        """Return the bytes of one transfer of the bundle."""
        return self.nbytes if self.pin_is_current or self.source_is_final else self.source_bytes

    def cast_bytes(self) -> int:
        """Return the bytes that the op of a resident bundle gets its weights cast to, or makes numbers in."""
        casts = sum(p.source.numel() * p.compute_dtype.itemsize for p in self.params if p.compute_dtype is not None)
        return casts + self._making_bytes()

    def _making_bytes(self) -> int:
        """Return the most that one of the quantised weights takes for its numbers. They are used one by one."""
        return max((param.making_bytes() for param in self.params), default=0)

    def making_cost(self, resident: bool) -> int:
        """Return the bytes that making the final form takes beside the source and, where that stays, its slice."""
        return max(0, self.offload_cost() - self.source_bytes - (self.nbytes if resident else 0))

    def load_cost(self) -> int:
        """Return the least temporary memory in which the bundle can become resident and be used, in bytes."""
        if self.source_is_final or self.pin_is_current or self.only_cast:
            return self.cast_bytes()
        if self.only_patched:
            return self.offload_cost() - self.nbytes - self.source_bytes
        return max(self.offload_cost() - self.nbytes, self.source_bytes, self.cast_bytes())

    # -- the module

    def borrowers(self) -> list[torch.nn.Module]:
        """Return the modules whose forward borrows this bundle."""
        return [self.module]

    def run(
        self, module: torch.nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the forward of a borrower with the tensors lent. A nested forward finds them there.

        Where the forward runs out of memory, weights give way. A forward that may be repeated then runs once more from
        its start.
        """
        if self.depth:
            return forward(*args, **kwargs)
        lending = self.lender.enter(self)
        try:
            return forward(*args, **kwargs)
        except Exception as error:
            if not lending.make_room(self, error, may_repeat(module)):
                lending.explain(self, error)
                raise
        finally:
            lending.exit(self)
        lending = self.lender.enter(self)
        try:
            return forward(*args, **kwargs)
        except Exception as error:
            lending.explain(self, error)
            raise
        finally:
            lending.exit(self)

    def install(self, tensors: Sequence[torch.Tensor]) -> None:
        """Let borrowed tensors stand in the module in place of its parameters."""
        # Not strict: for every layer call, that would cost as much as the rest of this loop.
        for (_, standing, attr), tensor in zip(self._places, tensors):  # noqa: B905
            standing[attr] = tensor
        for target, name, _, lent in self.lent_attributes:
            setattr(target, name, lent)

    def restore(self) -> None:
        """Put the idle parameters back."""
        for param, standing, attr in self._places:
            standing[attr] = param.idle
        for target, name, idle, _ in self.lent_attributes:
            setattr(target, name, idle)

    def check_present(self) -> None:
        """Raise SourceError where a parameter has no data."""
        for param in self.params:
            if param.source.is_meta:
                raise SourceError(
                    f"'{param.key}' ({tuple(param.source.shape)}) is needed by {type(self.module).__name__} "
                    f"'{self.name}', but the file has no such tensor. It is incomplete or of another architecture."
                )

    # -- the file behind it

    def count_writes(self) -> int:
        """Return a number that grows with every write of torch into a source."""
        total = 0
        for part in self._counting:
            total += part._version
        return total

    def check_files(self) -> None:
        """Raise FileChanged where a file that this bundle is read from has changed since it was opened.

        Wait until the bundle has come.
        """
        self.check_unchanged()
        self.arrive()

    def check_unchanged(self) -> None:
        """Do so without waiting. The caller waits for what he reads."""
        for disk_map in self._files:
            disk_map.check_unchanged()

    def arrive(self) -> None:
        """Wait until the bundle has come. Without this the op would compute with the zeros of a hole."""
        if self.coming:
            for file, offset, nbytes in self.coming:
                file.check(offset, nbytes)
            self.coming = []

    def has_come(self) -> bool:
        """Say whether all of the bundle is in its file."""
        return all(file.has(offset, nbytes) for file, offset, nbytes in self.coming)

    def check_files_often(self) -> None:
        """Do so at most once a millisecond."""
        for disk_map in self._files:
            disk_map.check_often()

    def drop_pages(self, from_cache: bool = False) -> None:
        """Give the pages of the memory map behind this bundle back to the system, its page cache's too on request."""
        for param in self.params:
            for disk_map, offset, nbytes in param.where:
                disk_map.drop(offset, nbytes, from_cache)

    def read_ahead(self) -> None:
        """Ask the system to read this bundle's part of the map."""
        for param in self.params:
            for disk_map, offset, nbytes in param.where:
                disk_map.will_need(offset, nbytes)

    def maps(self) -> set[DiskMap]:
        """Return the maps that the bundle reads from."""
        return {where[0] for param in self.params for where in param.where}
