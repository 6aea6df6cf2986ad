"""What VBARs promise, as a small model beside real ones.

The model knows who gives way first, how often each block was lost (`lost`, so whether a signature must be the same),
and between which bounds a VBAR's watermark lies: an implementation may refuse what ends above `low`, and must refuse
what ends above `high`. After every operation what has gone and what has come is compared with what the operation
allows. All sizes are in bytes but for the arguments of the operations, which are in units of the device.

A block is what can be evicted by itself, as (start, bytes): a page, or a slice.
"""

from __future__ import annotations

import math


class VbarModel:
    """One VBAR, and what is known of it."""

    def __init__(self, device, sizes):
        self.device = device
        self.vbar = device.vbar()
        self.pieces = [self.vbar.alloc(int(size * device.unit)) for size in sizes]
        self.blocks = [device.blocks_of(piece) for piece in self.pieces]
        self.every = sorted({block for blocks in self.blocks for block in blocks})
        self.here = set()
        self.pins = dict.fromkeys(self.every, 0)
        self.lost = dict.fromkeys(self.every, 0)
        self.lent = [0] * len(sizes)
        self.last = [(None, None, 0)] * len(sizes)  # of the last fault: signature, `lost` then, what was written
        self.limit = self.low = self.high = math.inf

    def end(self, index):
        return sum(self.blocks[index][-1])

    def is_above_limit(self, index):
        return self.pieces[index].offset + self.pieces[index].nbytes > self.limit

    def evictable(self, above=-1):
        """The blocks that could go, the first to go first."""
        return [
            block for block in reversed(self.every) if block in self.here and not self.pins[block] and block[0] > above
        ]

    def may_be_stranded(self, block):
        return self.device.traits.strands and sum(block) > self.low


class Model:
    """Some VBARs on one device. Every method raises AssertionError where a promise is broken."""

    sizes = (1, 3, 0.5, 0.5, 2, 1.5, 2.5, 1)

    def __init__(self, make_device, capacity=16, headroom=2, count=2):
        self.device = make_device(capacity=capacity, headroom=headroom)
        self.traits = self.device.traits
        self.headroom = headroom * self.device.unit
        self.vbars = [VbarModel(self.device, self.sizes) for _ in range(count)]
        self.order = list(self.vbars)  # lowest priority first; the newest is the highest

    # -- comparing

    def see(self, came=(), need=0, among=(), spare=0, first=()):
        """Compare what is resident now with what an operation allowed, and take it as known.

        came: the blocks that may be new, as (model, block). need: bytes that had to be freed, if there were so many,
        from the VBARs `among`. spare: bytes that may have been freed beyond that. first: what may go before all else,
        as (model, block). Returns the bytes freed.
        """
        before = {(model, block) for model in self.order for block in model.here}
        now = {(model, block) for model in self.order for block in self.device.resident_blocks(model.vbar)}
        assert now - before <= set(came), f"came unasked: {in_words(now - before - set(came))}"
        gone = before - now
        in_order = [(model, block) for model in self.order if model in among for block in model.evictable()]
        in_order = [entry for entry in in_order if entry in gone or not entry[0].may_be_stranded(entry[1])]
        limit_first = [*first, *(entry for entry in in_order if entry not in first)]
        went = [order[: len(gone)] for order in (in_order, limit_first) if gone == set(order[: len(gone)])]
        assert went, f"gone: {in_words(gone)}; the order is: {in_words(in_order)}"
        freed = sum(size for _, (_, size) in gone)
        if gone:
            last = went[0][-1][1]
            assert freed - last[1] < need + spare, f"gone: {in_words(went[0])}, for {need} bytes"
        asked_for_more = freed < need or any(model is not self.order[0] for model, _ in gone)
        if asked_for_more or (need and self.traits.reserves_below):
            # Who was asked and had nothing left may refuse everything until it is prioritized.
            for model in among:
                model.low = 0
        for model, block in gone:
            model.here.discard(block)
            model.lost[block] += 1
            model.low, model.high = min(model.low, block[0]), min(model.high, block[0])
        for model, block in now - before:
            model.here.add(block)
        return freed

    def check(self):
        """What holds at any time."""
        self.see()
        held = 0
        for model in self.order:
            nbytes = sum(size for _, size in model.here)
            held += nbytes
            assert model.vbar.loaded_size() == nbytes, "loaded_size is not what is resident"
            for index, piece in enumerate(model.pieces):
                assert model.vbar.resident(piece) == model.here.issuperset(model.blocks[index])
                if model.lent[index]:
                    assert self.device.holds(model.vbar.tensor(piece), model.last[index][2]), "pinned memory changed"
        assert self.device.held_bytes() == held, "the device holds something else than what is resident"

    # -- operations

    def nothing(self):
        pass

    def fault(self, which, index):
        model = self.vbars[which]
        blocks = model.blocks[index]
        missing = sum(size for start, size in blocks if (start, size) not in model.here)
        absent = sum(size for start, size in model.every if start <= blocks[-1][0] and (start, size) not in model.here)
        free = self.device.free_bytes()
        need = max(0, self.headroom + missing - free)
        lower = self.order[: self.order.index(model)]
        own = model.evictable(above=blocks[-1][0])
        could_free = sum(size for other in lower for _, size in other.evictable()) + sum(size for _, size in own)
        room = need <= could_free
        if need and missing and self.traits.reserves_below:
            room = room and absent + max(0, self.headroom - free) <= could_free
        over = (
            sum(size for _, size in model.here) + missing - model.limit
        )  # slices above a lowered limit may still be lent
        room = room and over <= sum(size for _, size in own)
        below = model.end(index) <= model.low or (not missing and not any(model.pins[block] for block in blocks))
        refusable = model.is_above_limit(index) or not room or not below
        impossible = missing and (model.is_above_limit(index) or model.end(index) > model.high)
        spare = (absent if self.traits.reserves_below else 0) + max(0, over)
        first = [(model, block) for block in own] if over > 0 else []

        signature = model.vbar.fault(model.pieces[index])

        if signature is None:
            assert refusable, "refused, though there was room"
            came = [(model, block) for block in blocks] if self.traits.refuses_half_done else ()
            spare += missing * self.traits.refuses_half_done
            self.see(came=came, need=need, among=self.order, spare=spare, first=first)
            if not model.is_above_limit(index):
                model.high = min(model.high, model.end(index) - 1)
                for other in self.order:
                    other.low = 0
            return
        assert not impossible, "granted above the watermark or the limit"
        came = [(model, block) for block in blocks]
        self.see(came=came, need=need, among=[*lower, model], spare=spare, first=first)
        assert not missing or self.device.free_bytes() >= min(self.headroom, free), "the headroom was granted"
        for block in blocks:
            model.pins[block] += 1
        model.lent[index] += 1
        self._use(model, index, signature)

    def _use(self, model, index, signature):
        memory, lost = model.vbar.tensor(model.pieces[index]), [model.lost[block] for block in model.blocks[index]]
        old_signature, old_lost, written = model.last[index]
        same = model.vbar.same(signature, old_signature)
        assert same == (lost == old_lost), "the signature is the same" if same else "the signature changed"
        if same:
            assert self.device.holds(memory, written), "the signature is the same, the bytes are not"
        written = (written + 1) % 251
        self.device.write(memory, written)
        model.last[index] = (signature, lost, written)

    def unpin(self, which, index):
        model = self.vbars[which]
        if not model.lent[index]:
            return
        model.vbar.unpin(model.pieces[index])
        model.lent[index] -= 1
        for block in model.blocks[index]:
            model.pins[block] -= 1
        # What lies above the watermark or the limit goes now; else nothing does.
        for block in set(model.blocks[index]) - self.device.resident_blocks(model.vbar):
            if not model.pins[block] and sum(block) > model.low:
                model.here.discard(block)
                model.lost[block] += 1
        self.see(need=self._beyond_limit(model), among=[model])
        self._check_limit(model)

    def free_memory(self, which, units):
        model, nbytes = self.vbars[which], int(units * self.device.unit)
        said = model.vbar.free_memory(nbytes)
        freed = self.see(need=nbytes, among=[model])
        assert said == freed, f"{said} bytes were said to be freed, {freed} were"
        assert freed >= nbytes or not self._left(model), "less than was asked for"

    def set_limit(self, which, units):
        model = self.vbars[which]
        model.vbar.set_limit(None if units is None else int(units * self.device.unit))
        model.limit = math.inf if units is None else self.device.round_limit(int(units * self.device.unit))
        model.high = math.inf
        self.see(need=self._beyond_limit(model), among=[model])
        self._check_limit(model)

    def _beyond_limit(self, model):
        """The limit is one on how much is resident; what lies above it as an address may go, too."""
        above = sum(size for start, size in model.evictable() if start + size > model.limit)
        return max(0, above, sum(size for _, size in model.here) - model.limit)

    def _check_limit(self, model):
        lent_above = any(pins and sum(block) > model.limit for block, pins in model.pins.items())
        over = sum(size for _, size in model.here) > model.limit
        assert lent_above or not over or not self._left(model), "more than the limit stays resident"

    def _left(self, model):
        return [block for block in model.evictable() if not model.may_be_stranded(block)]

    def others_take(self, units):
        """Other processes come to hold that much, or all that is free."""
        self.device.others_take(0)
        self.device.others_take(min(units, max(0, self.device.free_bytes()) // self.device.unit))

    def prioritize(self, which):
        model = self.vbars[which]
        model.vbar.prioritize()
        self.order.remove(model)
        self.order.append(model)
        model.low = model.high = math.inf

    def deprioritize(self, which):
        model = self.vbars[which]
        model.vbar.deprioritize()
        self.order.remove(model)
        self.order.insert(0, model)

    def replace(self, which):
        """Close one and make another."""
        model = self.vbars[which]
        model.vbar.close()
        self.order.remove(model)
        assert model.vbar.loaded_size() == 0 and model.vbar.free_memory(1) == 0
        self.check()
        self.vbars[which] = VbarModel(self.device, self.sizes)
        self.order.append(self.vbars[which])

    def close(self):
        for model in self.order:
            model.vbar.close()


def in_words(entries):
    return ", ".join(f"{start}+{size} of {id(model) % 1000}" for model, (start, size) in entries) or "nothing"
