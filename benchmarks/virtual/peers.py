"""Schedules of other projects on the same clock, each as its code has it.

All get the same budget for weights and their buffers, and the same RAM. A peer that reads a part of the model from the
disk at each step does so because the RAM cannot hold it, and reads it as the file has it. LoRAs cost a peer something
only where its code computes them at use.
"""

from __future__ import annotations

from typing import ClassVar

from kit.virtual.clock import Clock, Stream, Thread
from kit.virtual.devices import Machine

from .limits import ram_for_weights
from .work import Group, Op, Work

GIB = 1 << 30


class Peer:
    """Runs steps of a model. `plan` says once what stays, `step` moves the clock by one step."""

    name: ClassVar[str]

    def __init__(self, work: Work, machine: Machine, ram_gb: int, budget: int) -> None:
        self.work, self.budget, self.ram = work, budget, ram_for_weights(ram_gb)
        self.clock = Clock(machine)
        self.plan()
        self.in_ram = self.ram_bytes() <= self.ram

    def plan(self) -> None:
        """Choose what stays on the device."""

    def ram_bytes(self) -> int:
        """Return the bytes that the peer keeps in RAM where there is room."""
        return self.work.nbytes

    def step(self) -> None:
        """Run a step."""
        raise NotImplementedError

    def seconds(self, steps: int = 4) -> float:
        """Return what a later step takes."""
        clock, before = self.clock, 0.0
        for _ in range(steps):
            before = clock.main.at
            self.step()
            clock.wait_until(clock.main.at)
        return clock.main.at - before

    # -- what several need

    def run(self, op: Op, math: bool = False) -> None:
        if math and op.math:
            self.clock.compute(op.math, op.name, math=True)
        self.clock.compute(op.seconds, op.name)

    def pageable(self, what: Op | Group, stream: Stream | None = None) -> None:
        """Copy from memory that is not page-locked, or from the map of a file that RAM cannot hold."""
        self.clock.cold = not self.in_ram
        self.clock.thread.at += (what.tensors - 1) * self.clock.costs.copy
        self.clock.transfer(what.nbytes if self.in_ram else what.source, stream, pageable=True)

    def pinned(self, group: Group, stream: Stream | None) -> float:
        """Copy page-locked tensors, one call each. Return when they are there."""
        self.clock.thread.at += (group.tensors - 1) * self.clock.costs.copy
        return self.clock.transfer(group.nbytes, stream)[1]

    def synchronize(self, *streams: Stream) -> None:
        self.clock.wait_until(max(self.clock.main.at, *(stream.at for stream in streams)))


def bits_reversed(index: int) -> int:
    """Return what spreads the first of many indices evenly."""
    return int(f"{index:016b}"[::-1], 2)


class ComfyUI(Peer):
    """ComfyUI 0.33, dynamic VRAM: comfy/model_patcher.py (ModelPatcherDynamic.load, _load_list), comfy/ops.py
    (cast_modules_with_vbar), comfy/model_management.py (get_offload_stream), comfy/model_prefetch.py.

    Small weights stay, then the largest first, in one stretch of addresses. Others come layer by layer on two streams,
    each of which waits for what was launched before the layer before. LTX brings the next block while one computes.
    Pins are spread evenly. Unpinned weights are read by native threads while the launching thread waits. Patches are
    made at each use of what does not stay.
    """

    name = "ComfyUI"

    def plan(self) -> None:
        def by_size(op: Op) -> tuple:
            return op.nbytes >= 64 << 10, -op.nbytes, op.name

        self.resident: set[Op] = set()
        order = sorted(self.work.ops, key=by_size)
        buffers = 2 * max(op.nbytes for op in order)
        if self.work.prefetches_blocks:
            buffers = 2 * max(group.nbytes for group in self.work.groups)
        room = self.budget if self.budget >= self.work.nbytes else max(0, self.budget - buffers)
        for op in order:
            if op.nbytes > room:
                break
            self.resident.add(op)
            room -= op.nbytes
        self.room_for_pins = self.ram - 2 * GIB
        self.pins: set[Op] = set()
        offloaded = [op for op in self.work.ops if op not in self.resident]
        for _, op in sorted(enumerate(offloaded), key=lambda place: bits_reversed(place[0])):
            if op.nbytes <= self.room_for_pins:
                self.pins.add(op)
                self.room_for_pins -= op.nbytes
        self.streams, self.turn = [Stream("1"), Stream("2")], 0

    def next_stream(self) -> Stream:
        oldest = self.streams[self.turn]
        oldest.at = max(oldest.at, self.clock.main.at, self.clock.thread.at)
        self.turn = 1 - self.turn
        return self.streams[self.turn]

    def bring(self, op: Op, stream: Stream) -> None:
        clock = self.clock
        clock.call(4 * clock.costs.call)
        if op in self.pins:
            clock.transfer(op.nbytes, stream)
            return
        start = clock.thread.at
        clock.transfer(op.nbytes, stream)  # in parts, behind the reading
        clock.thread.at = start + op.source / clock.machine.disk  # pins have taken the RAM
        clock.note("reads: launching thread", start, clock.thread.at, op.name)
        stream.at = max(stream.at, clock.thread.at)

    def step(self) -> None:
        clock = self.clock
        groups = self.work.groups
        if not self.work.prefetches_blocks:
            for op in self.work.ops:
                if op not in self.resident:
                    stream = self.next_stream()
                    self.bring(op, stream)
                    clock.main.at = max(clock.main.at, stream.at)
                self.run(op, math=op not in self.resident)
            return
        for group in groups:
            stream = self.next_stream()
            for op in group.ops:
                if op not in self.resident:
                    self.bring(op, stream)
            clock.main.at = max(clock.main.at, stream.at)
            for op in group.ops:
                self.run(op, math=op not in self.resident)


class Diffusers(Peer):
    """diffusers 0.42: hooks/group_offloading.py with use_stream, one block a group (num_blocks_per_group=1).

    Nothing stays. A group's pre_forward waits on the host for its own transfer and begins the next one. Its
    post_forward waits for its computation (record_stream=False). What RAM cannot hold goes through
    offload_to_disk_path: load, pin, copy.
    """

    name = "diffusers group offload"

    def plan(self) -> None:
        self.stream = Stream("1")

    def onload(self, group: Group) -> None:
        clock = self.clock
        clock.wait_until(self.stream.at)
        self.stream.at = max(self.stream.at, clock.thread.at)
        if not self.in_ram:
            clock.cold = True
            clock.read(group.source)
            clock.lock(group.nbytes)
            clock.cold = False
            clock.read(group.nbytes)
        self.pinned(group, self.stream)

    def step(self) -> None:
        clock, groups = self.clock, self.work.groups
        self.onload(groups[0])
        for group, following in zip(groups, [*groups[1:], None], strict=True):
            if following is not None:
                self.onload(following)
            else:
                clock.wait_until(self.stream.at)
            for op in group.ops:
                self.run(op)
            clock.wait_until(clock.main.at)


class Mmgp(Peer):
    """mmgp 3.8: offload.py (tune_preloading, gpu_load_blocks), asyncTransfers, pinnedMemory.

    Everything beside the blocks stays, and evenly spaced blocks of each tower. Before another block computes, the
    device is synchronised. Then the next one comes on the transfer stream. The shuttle goes round where there is one
    tower only.
    """

    name = "mmgp"

    def plan(self) -> None:
        blocks = [group for group in self.work.groups if group.block]
        base = sum(group.nbytes for group in self.work.groups if not group.block)
        towers: dict[str, list[Group]] = {}
        for group in blocks:
            towers.setdefault(group.tower, []).append(group)
        floors = {tower: max(group.nbytes for group in floor) for tower, floor in towers.items()}
        room = max(0, self.budget - base - 2 * sum(floors.values()))
        total = sum(group.nbytes for group in blocks)
        self.resident: set[Group] = {group for group in self.work.groups if not group.block}
        self.following: dict[Group, Group | None] = {}
        for tower, floor in towers.items():
            count = int(sum(group.nbytes for group in floor) / total * room / floors[tower])
            space = (len(floor) - count) / count if count else 0.0
            cursor = space if count else float(len(floor))
            passing = []
            for number, group in enumerate(floor):
                if number < cursor:
                    passing.append(group)
                else:
                    self.resident.add(group)
                    cursor += 1 + space
            self.following |= dict(zip(passing, [*passing[1:], passing[0] if len(towers) == 1 else None], strict=False))
        if self.budget >= self.work.nbytes:
            self.resident = set(self.work.groups)
        self.stream = Stream("transfer")
        self.coming: Group | None = None

    def ram_bytes(self) -> int:
        return sum(group.nbytes for group in self.work.groups if group not in self.resident)

    def copy(self, group: Group, stream: Stream | None) -> None:
        if self.in_ram:
            self.pinned(group, stream)
        else:
            self.pageable(group, stream)

    def step(self) -> None:
        clock = self.clock
        for group in self.work.groups:
            if group not in self.resident:
                if self.coming is not group:
                    self.copy(group, None)
                self.synchronize(self.stream)
                self.coming = self.following[group]
                if self.coming is not None and self.coming is not group:
                    self.stream.at = max(self.stream.at, clock.thread.at)
                    self.copy(self.coming, self.stream)
            for op in group.ops:
                self.run(op)


class Accelerate(Peer):
    """accelerate 1.15: hooks.py (AlignDevicesHook), big_modeling.py (dispatch_model), utils/modeling.py
    (infer_auto_device_map).

    The first modules stay, as many as fit. Each other one comes before its forward, a blocking copy from pageable
    memory for each tensor on the stream that computes, and goes afterwards.
    """

    name = "accelerate"

    def plan(self) -> None:
        largest = max(op.nbytes for op in self.work.ops)
        room = self.budget if self.budget >= self.work.nbytes else self.budget - largest
        self.resident: set[Op] = set()
        for op in self.work.ops:
            if op.nbytes > room:
                break
            self.resident.add(op)
            room -= op.nbytes

    def ram_bytes(self) -> int:
        return sum(op.nbytes for op in self.work.ops if op not in self.resident)

    def step(self) -> None:
        for op in self.work.ops:
            if op not in self.resident:
                self.pageable(op)
            self.run(op)


class RamTorch(Peer):
    """RamTorch 1.11: ramtorch/offload.py (_loader_loop, _try_start_load, evenly_pinned), window=2.

    Blocks are the chunks that a user dices the model into, and the rest stays. Evenly spaced chunks stay too. A thread
    loads the next chunk of the step into a slot of two as soon as one is free, from page-locked memory. It knows no
    step but the one that runs. Chunks that RAM cannot hold come from the disk through one staging buffer. A slot
    counts as free when its chunk has been computed; the code lets go when it has been launched, and so takes memory
    beyond its window.
    """

    name = "RamTorch"

    def plan(self) -> None:
        blocks = [group for group in self.work.groups if group.block]
        base = sum(group.nbytes for group in self.work.groups if not group.block)
        window = 2 * max(group.nbytes for group in blocks)
        room = self.budget - base - (window if self.budget < self.work.nbytes else 0)
        for count in range(len(blocks), -1, -1):
            spaced = {blocks[index * len(blocks) // count] for index in range(count)}
            if sum(group.nbytes for group in spaced) <= room:
                break
        self.resident = {group for group in self.work.groups if not group.block} | spaced
        self.passing = [group for group in self.work.groups if group not in self.resident]
        self.on_disk: set[Group] = set()
        for number in range(1, len(blocks) + 1):
            if sum(group.nbytes for group in self.passing if group not in self.on_disk) <= self.ram:
                break
            self.on_disk = {blocks[(index + 1) * len(blocks) // number - 1] for index in range(number)} - spaced
        self.loader, self.stream, self.staged = Thread("loader"), Stream("1"), 0.0

    def load(self, group: Group, free_at: float) -> float:
        clock = self.clock
        self.loader.at = max(self.loader.at, free_at)
        with clock.as_thread(self.loader):
            if group in self.on_disk:
                clock.wait_until(self.staged)
                clock.cold = True
                clock.read(group.source)
            there = self.pinned(group, self.stream)
        if group in self.on_disk:
            self.staged = there
        return there

    def step(self) -> None:
        clock, begun = self.clock, self.clock.thread.at
        free, arrives, waiting = [begun, begun], {}, list(self.passing)

        def fill() -> None:
            while free and waiting:
                group = waiting.pop(0)
                arrives[group] = self.load(group, max(begun, free.pop(0)))

        fill()
        for group in self.work.groups:
            if group in arrives:
                clock.main.at = max(clock.main.at, arrives[group])
            for op in group.ops:
                self.run(op)
            if group in arrives:
                free.append(clock.main.at)
                fill()


PEERS: tuple[type[Peer], ...] = (ComfyUI, Diffusers, Mmgp, Accelerate, RamTorch)
