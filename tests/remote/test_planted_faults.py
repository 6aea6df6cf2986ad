"""Each wait for a file that is coming is taken away, and a download is made careless: a test fails for each.

They run with `dev.py test --slow`. Each takes a process of its own.
"""

import functools

import pytest

from kit.planting import Fault, check_is_seen, check_passes

WAITS = "remote/test_while_it_comes.py"
BRINGS = "remote/test_download.py"
SLOW = "remote/test_slow.py"
READER = f"{WAITS}::test_every_reader_waits_for_what_it_reads"
KILLED = f"{BRINGS}::test_a_process_that_is_killed_at_any_moment_forgets_and_never_invents"
IDLE = "ops.lending.idle_weight"
DOWNLOAD = "ops.remote.download:Download"
HTTP = "ops.remote.http_store:HttpStore"

FAULTS = {
    "a loan waits for nothing": Fault(
        "ops.lending.bundle:Bundle.arrive", "file.check(offset, nbytes)", "pass", (f"{READER}[a model in place]",)
    ),
    "a loan waits for its first bytes": Fault(
        "ops.lending.bundle:Bundle.arrive",
        "file.check(offset, nbytes)",
        "file.check(offset, 1)",
        (f"{READER}[a model in place]",),
    ),
    "weights in place may be read before they have come": Fault(
        f"{IDLE}:stands_itself", " and not param.coming()", "", (f"{READER}[a weight outside of a layer]",)
    ),
    "a source is read before it has come": Fault(
        f"{IDLE}:IdleWeight.stored", "check_files(memory_of(source))", "pass", (f"{READER}[a closed model]", READER)
    ),
    "a state dict has what has not come": Fault(
        f"{IDLE}:store_sources", "if parameter.bundle.coming and param.coming()", "if False", (READER,)
    ),
    "what is checked has not come": Fault(
        "ops.files.disk_map:check_files", "place[0].check(*place[1:])", "pass", (f"{READER}[a saved model]",)
    ),
    "half of a view is waited for": Fault(
        "ops.files.disk_map:extent", "(last + 1)", "(last + 1) // 2", (f"{READER}[tensors that are checked]", READER)
    ),
    "a cast reads what has not come": Fault(
        "ops.files.disk_map:DiskMap.tensor",
        "self.check(spec.offset, spec.nbytes)",
        "pass",
        (f"{READER}[a mapping in another dtype]",),
    ),
    "a mapping gives what has not come": Fault(
        "ops.files.disk_map:DiskMap.__getitem__",
        "self.check(spec.offset, spec.nbytes)",
        "pass",
        (f"{READER}[a mapping]",),
    ),
    "a map makes norms of what has not come": Fault(
        "ops.gguf.gguf_map:GgufMap.tensor",
        "self.check(spec.offset, spec.nbytes)",
        "pass",
        (f"{WAITS}::test_what_a_map_makes_of_its_tensors_waits_for_them",),
    ),
    "a map joins what has not come": Fault(
        "ops.gguf.vision:_rows",
        "check_files(memory for part in parts for memory in memory_of(part))",
        "pass",
        (f"{WAITS}::test_what_a_map_makes_of_its_tensors_waits_for_them",),
    ),
    "a file is read before it has come": Fault(
        "ops.files.coming_file:_Reader.readinto",
        "self.coming.wait(self.tell(), memoryview(buffer).nbytes)",
        "pass",
        (f"{READER}[a header]", f"{READER}[a file in memory]"),
    ),
    "operations of others read what has not come": Fault(
        "ops.files.check_before_read:_WaitForOperations.__torch_dispatch__",
        "_wait((args, kwargs))",
        "pass",
        (f"{READER}[code of others]",),
    ),
    "what may be a view counts as one": Fault(
        "ops.files.check_before_read:_WaitForOperations.__torch_dispatch__",
        "result = func.decompose(*args, **kwargs)",
        "result = NotImplemented",
        (f"{READER}[code of others in inference mode]",),
    ),
    "others read memory that has not come": Fault(
        "ops.files.check_before_read:_WaitForDirect.__torch_function__",
        "_wait(args)",
        "pass",
        (f"{READER}[code of others]",),
    ),
    "views wait": Fault(
        "ops.files.check_before_read:_reads",
        "return all(alias.is_write for alias in aliases)",
        "return True",
        (f"{WAITS}::test_code_that_only_looks_at_a_file_waits_for_nothing",),
    ),
    "rows are looked up before they have come": Fault(
        "ops.lending.lend_rows:_await",
        "file.check_all([(offset + row * width, width) for row in rows.tolist()])",
        "pass",
        (f"{WAITS}::test_a_table_brings_the_rows_that_are_looked_up",),
    ),
    "a table comes as a whole": Fault(
        "ops.lending.lend_rows:_await",
        "file.check_all([(offset + row * width, width) for row in rows.tolist()])",
        "file.check(offset, nbytes)",
        (f"{WAITS}::test_a_table_brings_the_rows_that_are_looked_up",),
    ),
    "a download is taken for a change": Fault(
        "ops.files.watched_file:WatchedFile._still_comes",
        "return status.st_size ==",
        "return status.st_size !=",
        (WAITS,),
    ),
    "nobody foresees in which order layers run": Fault(
        "patcher.arrival:foresee", "coming.expect(wanted, soon)", "pass", (WAITS,)
    ),
    "weights that have come stay idle": Fault(
        "patcher.dynamic_model:DynamicModel._stand_by_themselves",
        "bundle.stand_in(self._idle_device)",
        "pass",
        (f"{WAITS}::test_a_model_that_is_whole_is_an_ordinary_one",),
    ),
    "nobody may end a wait": Fault(
        "ops.files.coming_file:ComingFile._wait",
        "patience.check()",
        "pass",
        (f"{WAITS}::test_whoever_asks_for_a_stop_ends_the_wait_and_not_the_download",),
    ),
    "blocks count as come before they have": Fault(
        f"{DOWNLOAD}._bring",
        "data = self._read(offset, nbytes)",
        "data = (self._record.note(run), self._read(offset, nbytes))[1]",
        (KILLED,),
    ),
    "a record of another file is believed": Fault(
        "ops.remote.block_record:read",
        "not data.startswith(head) or",
        "",
        (f"{BRINGS}::test_what_came_to_another_process_counts_only_where_it_is_of_this_file",),
    ),
    "a file without a mark goes on": Fault(
        "ops.remote.fetch:fetch",
        " if state.mark else None",
        "",
        (f"{BRINGS}::test_what_came_to_another_process_counts_only_where_it_is_of_this_file",),
    ),
    "any range will do": Fault(
        f"{HTTP}._state_of",
        "if (first, last) != (offset, min(offset + nbytes, total) - 1)",
        "if False",
        (BRINGS,),
    ),
    "any state will do": Fault(f"{HTTP}._read", "if now != state", "if False", (BRINGS,)),
    "an answer that was cut counts": Fault(f"{HTTP}._read", "if left:", "if False:", (BRINGS,)),
    "a range may take for ever": Fault(f"{HTTP}._read", "if left and deadline.is_over", "if False", (SLOW,)),
    "a driver that hangs is asked again": Fault(
        "ops.remote.fsspec_store:FsspecStore._within", "if error.slow", "if False", (SLOW,)
    ),
    "what had come of a range is counted twice": Fault(
        f"{DOWNLOAD}._read", "offset + len(come), nbytes - len(come)", "offset, nbytes - len(come)", (SLOW,)
    ),
    "what was read of another content counts": Fault(
        "ops.remote.fsspec_store:FsspecStore._read",
        "if now != state",
        "if False",
        (f"{BRINGS}::test_a_range_that_was_read_of_another_content_is_refused",),
    ),
    "another process brings the same file": Fault(
        "ops.remote.fetch:_open_locked",
        "fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        (f"{BRINGS}::test_two_processes_do_not_bring_one_file",),
    ),
    "the file gets its name too early": Fault(
        f"{DOWNLOAD}._finish_if_whole",
        " or coming.come.find(0) >= 0",
        "",
        (BRINGS, WAITS),
    ),
}

passes = functools.cache(check_passes)


@pytest.mark.planted
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_seen(fault):
    """And its tests pass without it."""
    print(check_is_seen(fault))
    passes(fault.tests)
