"""Each wait of the engine is taken away, and other faults that a CPU forgives are planted: a test fails for each.

They run with `dev.py test --slow`. Each takes a process of its own.
"""

import ast
import functools

import pytest

from kit.pack import ROOT
from kit.planting import Fault, check_is_seen, check_passes

CASTER = "ops.lending.device_caster:DeviceCaster"
ROWS = "ops.lending.lend_rows"
CAREFUL = "ops.device.careful_backend:CarefulBackend"
CUDA = "ops.device.backend:StreamBackend"

READING = "ops.lending.reading"
WRITE_BACKS = "ops.lending.write_backs:WriteBacks"

CASES = "lending/test_caster.py"
PASSING = "lending/test_passing.py"
ARENA = "lending/test_arena.py"
READERS = "lending/test_readers.py"
AHEAD = "lending/test_read_ahead.py"
CONTRACT = "patcher/test_parity.py"
PINS = "lending/test_pins.py"
PAST_CACHE = "files/test_past_cache.py"
TABLES = "lending/test_table.py"
TABLE_FORMS = "lending/test_table_forms.py"
READS = "lending/test_idle_weight.py"
BUFFERS = "patcher/test_buffers.py"
BUDGET = "patcher/test_budget.py"
DROPPED = "patcher/test_dropped.py"
PATCHES = "patcher/test_patches.py"
BACKEND = "ops/test_backend.py"
ON_DEVICE = "fake_device/on_device/test_engine.py"
BITS = f"{ON_DEVICE}::test_the_bits_of_the_plain_module"
AIMDO = "cuda_sim/on_aimdo/test_dropped.py"

FAULTS = {
    "memory that is used again is given away while it is in use": Fault(
        "ops.lending.host_caster:HostCaster.complete",
        "loan.scratch = self.scratch.take(bundle.nbytes)",
        "loan.scratch = self.scratch.take(bundle.nbytes); self.scratch.give_back(loan.scratch)",
        (PASSING,),
    ),
    "a gradient's weights lie where the next weights are made": Fault(
        "ops.lending.host_caster:HostCaster._is_made_anew", "not torch.is_grad_enabled()", "True", (PASSING,)
    ),
    # Waits in their order along a loan's way.
    "memory is filled that kernels may still read": Fault(
        f"{READING}:_start", "backend.wait(event, stream)", "pass", (CASES, CONTRACT)
    ),
    "a slice is filled that kernels may still read": Fault(
        f"{CASTER}._try_to_start", "loan.after = [self.backend.record(None)]", "loan.after = []", (CASES, CONTRACT)
    ),
    "memory outside of the arena is filled that kernels may still read": Fault(
        f"{CASTER}._hold_target", "loan.after = [self.backend.record(None)]", "loan.after = []", (BUFFERS,)
    ),
    "a pin is read while it is being filled": Fault(
        f"{READING}:send_pinned",
        "backend.wait(pin.ready, stream)",
        "pass",
        (f"{PATCHES}::test_a_patched_weight_may_be_wanted_again_while_it_is_written_back",),
    ),
    "nobody knows that a pin is being read": Fault(
        f"{READING}:send_pinned", "loan.event = pin.busy =", "loan.event =", (PINS, READS)
    ),
    "nobody knows that a pin that was just filled is being read": Fault(
        f"{READING}:Reading._send", "self.pin.busy = loan.event", "pass", (PINS,)
    ),
    "a pin goes while a reader fills it": Fault(
        "ops.lending.pins:Pins.drop", "self._changed.wait()", "break", (READERS,)
    ),
    "nobody waits for a reader": Fault(f"{CASTER}.complete", "loan.job.wait()", "pass", (CASES,)),
    "a reader goes on when its loan has ended": Fault(
        f"{READING}:Reading.end", "job.cancel()", "pass", (CASES, READERS)
    ),
    "a reader that failed may have begun a transfer": Fault(
        f"{READING}:Reading._send", "backend.synchronize()", "pass", (PINS, READERS)
    ),
    "what could not be begun ahead may have begun": Fault(
        f"{CASTER}._start_ahead", "self.backend.synchronize()", "pass", (PINS, READERS)
    ),
    "nothing is awaited where a transfer may have begun": Fault(
        "ops.lending.caster:Caster.begin", "self.backend.synchronize()", "pass", (PINS,)
    ),
    "what is asked for is read into memory that nobody counts": Fault(
        "ops.lending.read_ahead:ReadAhead._staging_for", "loan.job.wait()", "pass", (AHEAD,)
    ),
    "staging is filled again while it is being read": Fault(
        f"{READING}:Reading._send", "self._give_back(loan.event)", "self._give_back(None)", (CASES,)
    ),
    "staging is not waited for": Fault(f"{READING}:Reading.fill", "event.synchronize()", "pass", (AHEAD,)),
    "staging that was never filled is given back as done": Fault(
        f"{READING}:Reading._give_back", "event.synchronize()", "pass", (AHEAD,)
    ),
    "a pin goes before its transfer is started": Fault(
        f"{READING}:Reading.send_to", "self.pins.hold(self.bundle, self.pin)", "True", (READERS, PINS)
    ),
    "what was read is sent when its loan has ended": Fault(
        f"{CASTER}._end_ahead", "loan.job.cancel()", "pass", (CASES, READERS, PINS)
    ),
    "nobody waits for a transfer": Fault(f"{CASTER}.complete", "self.backend.wait(loan.event, None)", "pass", (CASES,)),
    "what is not made yet is written back": Fault(
        f"{WRITE_BACKS}.begin", "self.backend.wait(self.backend.record(None), stream)", "pass", (CASES,)
    ),
    "nothing is awaited where a write-back may have begun": Fault(
        f"{WRITE_BACKS}.begin", "self.backend.synchronize()", "pass", (PINS,)
    ),
    "half a pin is kept": Fault(f"{WRITE_BACKS}.begin", "self.pins.drop(bundle)", "pass", (PINS,)),
    "memory goes that is being written back": Fault(
        f"{WRITE_BACKS}.begin", "self._under_way.append((pin.ready, memory))", "pass", (CASES,)
    ),
    "memory goes that is still being written back": Fault(
        f"{WRITE_BACKS}.finish", "event.synchronize()", "pass", (PINS,)
    ),
    "every write-back counts as done": Fault(
        f"{WRITE_BACKS}.forget_done", "if event is not None and not event.query()", "if False", (CASES, PINS)
    ),
    "an extent is given back as done": Fault(
        f"{CASTER}._free_extent", "done = self.backend.record(None)", "pass", (CASES,)
    ),
    "an extent forgets its last use": Fault(
        "ops.lending.arena:Arena._cut",
        "if segment.done is not None and not segment.is_idle",
        "if False",
        (ARENA, CASES),
    ),
    "the rest of an extent forgets its last use": Fault(
        "ops.lending.arena:Arena._cut", "run[-1].done, run[-1].given", "None, 0", (ARENA,)
    ),
    "new memory of an arena is filled at once": Fault(
        "ops.lending.arena:Arena._grow", "self._born()", "None", (ARENA, CASES)
    ),
    "a block goes before it is done": Fault(
        "ops.lending.arena:Arena._drop", "segment.done.synchronize()", "pass", (ARENA, CASES)
    ),
    "an unused transfer is not awaited": Fault(f"{CASTER}.finish", "loan.event.synchronize()", "pass", (CASES, PINS)),
    "a pin goes while it is under way": Fault("ops.lending.pins:Pins.drop", "event.synchronize()", "pass", (PINS,)),
    "a pin goes while it is being filled": Fault(
        "ops.lending.pins:Pins.drop", "(pin.ready, pin.busy)", "(pin.busy,)", (PINS,)
    ),
    "a pin goes while it is being read": Fault(
        "ops.lending.pins:Pins.drop", "(pin.ready, pin.busy)", "(pin.ready,)", (PINS,)
    ),
    "memory goes with a model that is closed": Fault(
        f"{CASTER}.close", "self.backend.synchronize()", "pass", (DROPPED,)
    ),
    "memory goes with a model that is dropped": Fault(f"{CASTER}.__init__", "backend.settle", "int", (DROPPED,)),
    "settling does not wait": Fault("ops.device.backend:Backend.settle", "self.synchronize()", "pass", (DROPPED,)),
    "pages are evicted from under kernels": Fault(
        "ops.vbar.aimdo:AimdoVBAR.free_memory", "self.backend.settle()", "pass", (AIMDO,)
    ),
    "pages go from under kernels": Fault("ops.vbar.aimdo:_free", "backend.settle()", "pass", (AIMDO,)),
    # Waits around calls that fail.
    "a failed call is tried again at once": Fault(
        "ops.device.backend:Backend.retry_once", "self.synchronize()", "pass", (BACKEND,)
    ),
    "transfers are synchronous while others are under way": Fault(
        f"{CAREFUL}._step_down", "self.synchronize()", "pass", (BACKEND,)
    ),
    "a device that does not answer is used on": Fault(f"{CAREFUL}.copy", "self.synchronize()", "pass", (BACKEND,)),
    "nobody waits for a device in use": Fault(
        f"{CAREFUL}.synchronize",
        "    try:\n        self.unwrapped.synchronize()\n    except RuntimeError:\n",
        "    try:\n        pass\n    except RuntimeError:\n",
        (BACKEND,),
    ),
    "a device that failed once is not waited for again": Fault(
        f"{CAREFUL}.synchronize",
        "self.unwrapped.synchronize()\n        except RuntimeError as error:",
        "pass\n        except RuntimeError as error:",
        (BACKEND,),
    ),
    # Torch's streams.
    "streams do not wait": Fault(
        f"{CUDA}.wait", "(stream or self._module.current_stream(self.device)).wait_event(event)", "pass", (BITS,)
    ),
    "events are not recorded": Fault(
        f"{CUDA}.record", "event.record(stream or self._module.current_stream(self.device))", "pass", (BITS,)
    ),
    "the device is not waited for": Fault(
        f"{CUDA}.synchronize",
        "self._module.synchronize(self.device)",
        "pass",
        (f"{ON_DEVICE}::test_synchronising_waits_for_side_streams",),
    ),
    # What a CPU cannot show.
    "buffers stay where they are": Fault(
        "patcher.dynamic_model:DynamicModel.place_buffers",
        "self._placed.place()",
        "pass",
        (f"{ON_DEVICE}::test_buffers_are_where_the_module_computes",),
    ),
    "buffers stay on the device": Fault(
        "patcher.dynamic_model:DynamicModel.release",
        "self._placed.give_back()",
        "pass",
        (f"{ON_DEVICE}::test_buffers_are_where_the_module_computes",),
    ),
    "an idle weight stays where it is": Fault(
        "ops.lending.bundle:Bundle.stand_in",
        "param.idle = idle_form(self, param, device)",
        "param.idle = param.original",
        (READS,),
    ),
    "an idle weight is not patched": Fault(
        "ops.lending.idle_weight:IdleWeight.lent",
        "yield self.view_of(self._of(tensors[self.bundle.params.index(self.param)]))",
        "yield self.view_of(self.param.source.to(self.device, self.dtype))",
        (READS,),
    ),
    "a patch gets a weight on the CPU": Fault(
        "ops.lending.final_form:_patch_into",
        "made = param.patch(numbers)",
        "made = param.patch(numbers.cpu())",
        (f"{ON_DEVICE}::test_patches_are_made_on_the_device",),
    ),
    # Rows of tables, whose one transfer nothing has to wait for.
    "rows are not brought": Fault(f"{ROWS}:_bring", "backend.copy(memory, host, None)", "pass", (TABLES,)),
    "rows come from a file that has changed": Fault(
        f"{ROWS}:_bring",
        "table.check_unchanged()  # rows that were written meanwhile must not be used",
        "pass",
        (TABLES,),
    ),
    "rows ignore the budget": Fault(f"{ROWS}:_bring", "caster.make_way(held)", "pass", (TABLES,)),
    "rows are not counted": Fault(f"{ROWS}:lend_rows", "caster.rows_bytes += held", "pass", (TABLES,)),
    "a table is brought ahead as a whole": Fault(
        "ops.lending.table:leave_order", "bundle.successor = following", "pass", (TABLE_FORMS,)
    ),
    "a whole table among rows": Fault(
        "ops.lending.idle_weight:_have_rows", "len(idle) != len(tables) or ", "", (TABLE_FORMS,)
    ),
    # What lies where.
    "pins go to whoever asks first": Fault("ops.lending.pins:Pins._left_out", "if room >= total:", "if True:", (PINS,)),
    "memory that is locked takes the place of pages that are next": Fault(
        "ops.lending.pins:Pins._displaces", "if not self.outgrow_ram or", "if True or", (PINS,)
    ),
    "what was read past the page cache takes the place of what was written": Fault(
        "ops.files.disk_map:DiskMap.read_past_cache",
        "if has_private_pages(self.address + start, end - start):",
        "if False:",
        (PAST_CACHE,),
    ),
    "half of a range is read past the page cache": Fault(
        "ops.files.past_cache:PastCache._read_piece", "if came < needed:", "if False:", (PAST_CACHE,)
    ),
    "what was left out waits for ever": Fault("ops.lending.pins:Pins._waits", " and not self._full", "", (PINS,)),
    "moving what is there costs nothing": Fault(
        "patcher.layout:Layouts.best", "pace.transfer(left) / PAYS_WITHIN", "0.0", ("patcher/test_layout.py",)
    ),
    # Limits and repeats.
    "more is on its way to pins than was planned for": Fault(
        f"{WRITE_BACKS}.begin", "self.finish(self.nbytes - self.most)", "pass", (CASES,)
    ),
    "what is made waits for what was made last to reach its pin": Fault(
        "patcher.planning:Planning.room", "kept = made[0] + max(around, default=0)", "kept = 0", (CASES,)
    ),
    "the limit is ignored": Fault(
        "ops.vbar.software:SoftwareVBAR.set_limit", "self.limit = nbytes", "self.limit = None", (BUDGET,)
    ),
    "comfy-aimdo's limit is ignored": Fault(
        "ops.vbar.aimdo:AimdoVBAR._is_above_limit",
        "return self.limit is not None and",
        "return False and",
        (f"{AIMDO}", "cuda_sim/on_aimdo/test_headroom.py"),
    ),
    # Buffers of bundles on their way, and what they are read into.
    "the arena outlives what frees it": Fault(
        f"{CASTER}.free_buffers", "self.arena.clear()", "pass", (f"{BUFFERS}::test_buffers_go_with_the_weights",)
    ),
    "staging outlives what frees it": Fault(
        f"{CASTER}.free_buffers", "self.staging.clear()", "pass", (f"{BUFFERS}::test_buffers_go_with_the_weights",)
    ),
    "the arena is counted nowhere": Fault(
        f"{CASTER}.buffer_bytes", "self.arena.nbytes + self._outside()", "self._outside()", (BUFFERS,)
    ),
    "staging is counted nowhere": Fault(f"{CASTER}.staging_bytes", "self.staging.nbytes", "0", (BUFFERS,)),
    "the arena is as large as it likes": Fault(
        f"{CASTER}.set_room", "self.arena.resize(arena)", "self.arena.resize(nbytes + (1 << 20))", (BUFFERS,)
    ),
    "staging is as large as it likes": Fault(
        f"{CASTER}.set_room",
        "self.staging.resize(staging, staged)",
        "self.staging.resize(1 << 30, 1 << 30)",
        (f"{BUFFERS}::test_one_large_bundle_does_not_grow_every_buffer",),
    ),
    "buffers of what has come to stay are kept": Fault(
        "patcher.residency:Residency.drop_buffers",
        "caster.free_buffers()",
        "pass",
        (f"{BUFFERS}::test_a_model_that_has_come_to_stay_holds_no_buffers",),
    ),
    "weights go before buffers": Fault(
        "patcher.residency:Residency.free",
        "freed = self.caster.free_buffers()",
        "freed = 0",
        (f"{BUFFERS}::test_buffers_go_with_the_weights",),
    ),
    "a library without figures is asked for them": Fault(
        "ops.ram.allocator:arenas",
        'libc is None or not hasattr(libc, "mallinfo2")',
        "libc is None",
        ("ram/test_available.py::test_a_library_without_figures_gives_none", "ram/test_arena_log.py"),
    ),
    "pins give way to twice the size": Fault(
        "patcher.ram_pressure:free_ram",
        "short = nbytes - available_ram()",
        "short = 2 * nbytes - available_ram()",
        ("patcher/test_ram_pressure.py::test_room_for_another_model_is_made_by_pins",),
    ),
    "sizes that are equal by chance are one symbol": Fault(
        "ops.compile.compiled_function:compiler_settings",
        "use_duck_shape=False",
        "use_duck_shape=True",
        ("compile/test_blocks.py::test_sizes_that_are_equal_by_chance_are_no_rule",),
    ),
    "bundles on their way ignore the budget": Fault(f"{CASTER}.set_room", "self.room = nbytes", "pass", (BUFFERS,)),
    "whatever has begun runs again": Fault(
        "ops.lending.repeat:may_repeat", "cls = type(module)", "return True", ("lending/test_repeat.py",)
    ),
}

WAITS = ("settle", "synchronize", "wait", "wait_event")
# What is waited for is a time that is measured, and no number of a picture.
MEASURES = {"ops.lending.stopwatch:Stopwatch.seconds", "ops.lending.stopwatch:Stopwatch.bus"}

passes = functools.cache(check_passes)


def waits(node, place):
    """Yield (place, source) of each call that waits."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            yield from waits(child, place + ("." if place[-1] != ":" else "") + child.name)
            continue
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute) and child.func.attr in WAITS:
            yield place, ast.unparse(child)
        yield from waits(child, place)


def test_every_wait_has_its_fault():
    files = [path for folder in ("device", "lending", "vbar") for path in (ROOT / "ops" / folder).glob("*.py")]
    found = {
        wait
        for path in files
        for wait in waits(ast.parse(path.read_text(encoding="utf-8")), f"ops.{path.parent.name}.{path.stem}:")
    }
    assert len(found) > 20
    planted = [(fault.where, fault.words) for fault in FAULTS.values()]
    missing = [
        wait
        for wait in sorted(found)
        if wait[0] not in MEASURES and not any(where == wait[0] and wait[1] in words for where, words in planted)
    ]
    assert not missing


@pytest.mark.planted
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_seen(fault):
    """And its tests pass without it."""
    print(check_is_seen(fault))
    passes(fault.tests)
