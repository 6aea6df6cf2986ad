"""Compiled blocks when something goes wrong: the result is right all the same, and nothing stays lent."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from kit.compiled_net import DEPTH, WIDTH, Block, Net, inputs, nothing_lent, said
from kit.pack import ROOT
from kit.sim_device import SimDevice
from spillway.ops.compile.compiled_function import CompileSettings


def test_a_part_called_outside_of_its_block_borrows_it(make):
    model, plain = make(device=SimDevice(), vram_bytes=0)
    part, same = model.module.blocks[1].mlp[0], plain.blocks[1].mlp[0]
    assert torch.equal(part(inputs()), same(inputs()))
    assert nothing_lent(model)
    assert said(model, "parts of 'blocks.1' are called from outside of it")


def test_a_backend_that_is_not_installed(make):
    model, plain = make(backend="no-such-backend")
    assert torch.equal(model(inputs()), plain(inputs()))
    (line,) = said(model, "compile failed; running uncompiled.")
    assert "no-such-backend" in line


class Breaking(Block):
    """Writes into its input, then cannot be traced any further in one piece."""

    def forward(self, x, options=None):
        x += 1
        torch._dynamo.graph_break()
        return super().forward(x)


def test_a_block_that_failed_half_way_starts_from_what_it_was_given(make):
    made = []

    def backend(graph, examples):
        made.append(graph)

        def run(*args):
            out = graph(*args)
            if len(made) == 1:
                raise RuntimeError("broken code")
            return out

        return run

    model, plain = make(backend=CompileSettings(backend=backend))
    assert torch.equal(model(inputs()), plain(inputs()))
    assert said(model, "compile failed; running uncompiled. Block: RuntimeError: broken code")
    assert torch.equal(model(inputs(3)), plain(inputs(3)))


def test_fullgraph_that_cannot_be_runs_uncompiled(make):
    model, plain = make(lambda: Net(Breaking), backend=CompileSettings(backend="eager", fullgraph=True))
    assert torch.equal(model(inputs()), plain(inputs()))
    assert said(model, "compile failed; running uncompiled. Breaking: ")


def test_graph_breaks_are_right(make):
    model, plain = make(lambda: Net(Breaking))
    for batch in (2, 1, 3):
        assert torch.equal(model(inputs(batch)), plain(inputs(batch)))
    assert not said(model, "compile failed")


def test_out_of_memory_in_a_compiled_block_runs_it_again_on_what_it_was_given(make):
    left = [0]

    def backend(graph, examples):
        def run(*args):
            out = graph(*args)  # it has written into its input
            if left[0]:
                left[0] -= 1
                raise torch.OutOfMemoryError("simulated: out of memory")
            return out

        return run

    model, plain = make(backend=CompileSettings(backend=backend))
    model(inputs())
    for shape in ((2, 7), (5, 9)):  # one that has run before, and one that has not
        left[0] = 1
        assert torch.equal(model(inputs(*shape)), plain(inputs(*shape)))
    assert model.ledger.counters.retries == 2
    assert not said(model, "compile failed")


class Taking(Block):
    """Takes an entry out of a list that it is given, and leaves the graph before it goes on."""

    def forward(self, x, options=None):
        y = options.pop()
        torch._dynamo.graph_break()
        return super().forward(x + y)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("simulated: out of memory"), RuntimeError("broken code")])
def test_a_block_that_took_something_out_of_a_list_is_not_run_again(make, error):
    left = [0]

    def backend(graph, examples):
        def run(*args):
            if left[0] and len(examples) > 4:  # what comes after the break, with the weights
                left[0] -= 1
                raise error
            return graph(*args)

        return run

    def given():
        return [inputs(seed=seed) for seed in range(2 * DEPTH)]

    model, plain = make(lambda: Net(Taking), backend=CompileSettings(backend=backend))
    wanted = plain(inputs(), options=given())
    assert torch.equal(model(inputs(), options=given()), wanted)
    left[0] = 1
    with pytest.raises(type(error), match=str(error)):
        model(inputs(), options=given())
    assert not left[0] and model.ledger.counters.retries == 0
    assert torch.equal(model(inputs(), options=given()), wanted)


def test_out_of_memory_in_an_uncompiled_block_repeats_one_layer(make):
    model, plain = make()
    for block in model.blocks:
        block.compute = None
    model(inputs())
    left, linear = [1], torch.nn.Linear.forward

    def short(self, x):
        if self is model.module.blocks[2].mlp[2] and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("simulated: out of memory")
        return linear(self, x)

    torch.nn.Linear.forward = short
    try:
        assert torch.equal(model(inputs()), plain(inputs()))
    finally:
        torch.nn.Linear.forward = linear
    assert not left[0] and model.ledger.counters.retries == 1


class Stop(Exception):
    pass


@pytest.mark.parametrize("device", [None, SimDevice], ids=["cpu", "deferred"])
def test_an_interrupt_gives_the_loan_back(make, device):
    stop = []

    def prepare(block, args, kwargs):
        if stop and block is model.module.blocks[2]:
            raise Stop
        return args, kwargs

    model, plain = make(device=device and device(), prepare=prepare, vram_bytes=0)
    model(inputs())
    stop.append(True)
    with pytest.raises(Stop):
        model(inputs())
    assert nothing_lent(model)
    stop.clear()
    assert torch.equal(model(inputs()), plain(inputs()))
    assert not said(model, "compile failed")


def test_an_error_of_the_model_is_raised_as_it_is(make):
    model, plain = make()
    model(inputs())
    with pytest.raises(RuntimeError, match=r"shape|size|normalized"):
        model.module.blocks[0](torch.randn(2, 3, WIDTH + 1))
    assert nothing_lent(model)
    assert torch.equal(model(inputs()), plain(inputs()))


def test_no_cpp_compiler(tmp_path):
    """In a process of its own: torch remembers the compiler that it found."""
    program = """
        import pathlib, sys
        sys.path[:0] = [{tests!r}]
        import kit.pack, torch
        from kit.compiled_net import compiled, inputs, said
        with torch.inference_mode():
            model, plain = compiled(pathlib.Path({path!r}), backend="inductor")
            assert torch.equal(model(inputs()), plain(inputs()))
        print(said(model, "compile failed; running uncompiled."))
    """
    path = str(tmp_path / "net.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program).format(tests=str(ROOT / "tests"), path=path)],
        env={**os.environ, "CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "/nowhere/c++" in done.stdout or "CppCompile" in done.stdout or "compiler" in done.stdout
