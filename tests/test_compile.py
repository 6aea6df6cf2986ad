"""Blocks compiled with their weights lifted out: right at any residency, compiled once, and harmless when it fails."""

import os
import subprocess
import sys
import textwrap

import nets
import pytest
import torch
import torch._dynamo
import torch._dynamo.utils
from sim_device import SimDevice

from spillway.ops import compiled
from spillway.ops.compiled import BlockCompiler, CompileSettings, compile_count
from spillway.ops.disk_map import DiskMap
from spillway.patcher.dynamic import DynamicModel
from spillway.patcher.policy import Policy

WIDTH, DEPTH = 64, 5


class Block(torch.nn.Module):
    """Nested modules, a parameter and a buffer of its own, options; it writes into its input, as blocks do."""

    def __init__(self, width=WIDTH, factor=1.0):
        super().__init__()
        self.factor = factor
        self.norm = torch.nn.LayerNorm(width)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(width, 2 * width), torch.nn.GELU(), torch.nn.Linear(2 * width, width, bias=False)
        )
        self.gate = torch.nn.Parameter(torch.empty(width))
        self.register_buffer("shift", torch.empty(width))

    def forward(self, x, options=None):
        x += self.factor * self.gate * self.mlp(self.norm(x) + self.shift)
        return x


class Net(torch.nn.Module):
    def __init__(self, block=Block, depth=DEPTH):
        super().__init__()
        self.embed = torch.nn.Linear(WIDTH, WIDTH)
        self.blocks = torch.nn.ModuleList(block() for _ in range(depth))
        self.head = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x, **options):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, **options)
        return self.head(x)


NAMES = [f"blocks.{index}" for index in range(DEPTH)]


def inputs(batch=2, length=7, seed=0):
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def as_when_sampling():
    """Nothing is compiled yet."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled._recent.clear()
    with torch.inference_mode():
        yield


@pytest.fixture
def make(tmp_path):
    """A model of a file, compiled by blocks, and the plain module beside it."""

    def made(build=Net, dtype=torch.float32, device=None, backend="eager", prepare=None, **policy):
        path = tmp_path / "net.safetensors"
        state = nets.write(path, build(), dtype)
        with nets.skip_model_initialization():
            module = build()
        model = DynamicModel(module, DiskMap(path), "cpu", Policy(**policy), backend=device, blocks=NAMES)
        settings = backend if isinstance(backend, CompileSettings) else CompileSettings(backend=backend)
        compiler = BlockCompiler(settings, model.ledger, prepare=prepare)
        compiler.attach([bundle.block for bundle in model.bundles if bundle.block is not None])
        return model, nets.plain(build, state, torch.float32)

    return made


def said(model, text):
    return [line for line in model.ledger.decisions if text in line]


def nothing_lent(model):
    return all(bundle.loan is None and bundle.depth == 0 for bundle in model.bundles)


# -- what it is for


@pytest.mark.parametrize("device", [None, SimDevice, lambda: SimDevice(eager="some")], ids=["cpu", "deferred", "some"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_graph_for_all_blocks_whatever_changes(make, device, dtype):
    """After a batch of one and a larger one nothing recompiles: residency, patches, sizes. A missing wait gives NaN."""
    model, plain = make(dtype=dtype, device=device and device())
    model(inputs(1))
    model(inputs(2))
    graphs = compile_count()
    assert model.ledger.counters.graphs_compiled == graphs == 2
    keys = [f"{name}.mlp.0.weight" for name in NAMES]
    weights = dict(plain.named_parameters())
    for fraction in (None, 1.0, 0.5, 0.25, 0.0):
        model.set_policy(Policy(vram_bytes=nets.budget(model, fraction)))
        for strength in (0.0, 0.5, 1.0):
            model.set_patches({key: lambda w, s=strength: w + s for key in keys} if strength else {})
            patched = {key: weights[key] + strength for key in keys}
            for batch, length in ((2, 7), (3, 16), (1, 7), (2, 64)):
                x = inputs(batch, length)
                wanted = torch.func.functional_call(plain, patched, (x,))
                assert torch.equal(model(x), wanted), (fraction, strength, batch, length)
    assert compile_count() == graphs
    assert nothing_lent(model)


@pytest.mark.parametrize(("backend", "batches"), [("inductor", (2, 3)), ("aot_eager", (2, 1, 3))])
def test_backends_that_write_code_anew(make, backend, batches):
    """The same within the compiler's own tolerance; what a block writes into its input arrives."""
    model, plain = make(backend=backend)
    for batch in batches:
        torch.testing.assert_close(model(inputs(batch)), plain(inputs(batch)))
    model.set_policy(Policy(vram_bytes=nets.budget(model, 0.25)))
    torch.testing.assert_close(model(inputs(4, 30)), plain(inputs(4, 30)))
    assert model.ledger.counters.graphs_compiled == len(set(min(batch, 2) for batch in batches))


def test_a_block_is_one_loan(make):
    model, plain = make(device=SimDevice(), vram_bytes=0, prefetch=0)
    assert torch.equal(model(inputs()), plain(inputs()))
    assert [bundle.name for bundle in model.bundles] == ["embed", *NAMES, "head"]
    assert model.ledger.counters.misses == len(model.bundles)


def test_models_share_what_is_compiled(make):
    first, plain = make()
    assert torch.equal(first(inputs()), plain(inputs()))
    graphs = compile_count()
    second, plain = make(dtype=torch.bfloat16)  # it computes in the dtype of the module all the same
    assert torch.equal(second(inputs()), plain(inputs()))
    assert compile_count() == graphs
    first.close()
    assert torch.equal(second(inputs(5)), plain(inputs(5)))


def test_in_and_out_of_inference_mode(make):
    model, plain = make()
    model(inputs())
    with torch.inference_mode(False), torch.no_grad():
        assert torch.equal(model(inputs()), plain(inputs()))
    assert torch.equal(model(inputs()), plain(inputs()))


# -- what a graph may not know


class Hidden(Block):
    """A tensor that is neither a parameter nor a buffer, another in each block."""

    def __init__(self):
        super().__init__()
        self.offset = torch.zeros(WIDTH)

    def forward(self, x, options=None):
        return super().forward(x) + self.offset


def test_blocks_that_differ_in_a_setting_do_not_share(make):
    model, plain = make()
    for net in (model.module, plain):
        net.blocks[1].factor, net.blocks[2].mlp[1].approximate = 3.0, "tanh"
    assert torch.equal(model(inputs()), plain(inputs()))
    assert model.ledger.counters.graphs_compiled == 3


def test_hidden_tensors_are_lifted_too(make):
    model, _ = make(lambda: Net(Hidden))
    for number, block in enumerate(model.module.blocks):
        block.offset = torch.full((WIDTH,), float(number))
    shifted = [block(inputs()) for block in model.module.blocks]
    assert model.ledger.counters.graphs_compiled == 1
    for number, block in enumerate(model.module.blocks):
        block.offset = torch.zeros(WIDTH)
        assert torch.equal(block(inputs()) + number, shifted[number])


def test_a_tensor_in_a_list_keeps_a_block_uncompiled(make):
    model, plain = make()
    model.module.blocks[2].cache = [torch.zeros(1)]
    assert torch.equal(model(inputs()), plain(inputs()))
    assert said(model, "blocks.2 runs uncompiled: Block.cache holds a tensor")


def test_a_hook_inside_keeps_a_block_uncompiled(make):
    model, plain = make()
    calls = []
    model.module.blocks[1].mlp[0].register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(model(inputs()), plain(inputs()))
    assert calls and said(model, "blocks.1 runs uncompiled: 'mlp.0' (Linear) has hooks")


def test_hooks_of_the_block_itself_run_around_it(make):
    model, plain = make()
    for net in (model.module, plain):
        net.blocks[0].register_forward_hook(lambda module, args, out: out * 2)
    assert torch.equal(model(inputs()), plain(inputs()))
    assert model.ledger.counters.graphs_compiled == 1


def test_a_replaced_forward_runs(make):
    model, plain = make()
    for net in (model.module, plain):
        block = net.blocks[3]
        block.mlp[0].forward = lambda x, layer=block.mlp[0]: torch.nn.functional.linear(x, layer.weight)
    assert torch.equal(model(inputs()), plain(inputs()))
    assert said(model, "the forward of 'mlp.0' (Linear) was replaced")


def test_options_are_guarded_by_value(make):
    class Optional(Block):
        def forward(self, x, options=None):
            return super().forward(x) * options["factor"]

    model, plain = make(lambda: Net(Optional))
    for factor in (2, 3, 4):
        options = {"factor": factor}
        assert torch.equal(model(inputs(), options=options), plain(inputs(), options=options))


def test_prepare_can_keep_a_call_uncompiled(make):
    model, plain = make(prepare=lambda block, args, kwargs: "not today" if kwargs.get("options") else (args, kwargs))
    assert torch.equal(model(inputs(), options={"x": 1}), plain(inputs()))
    assert compile_count() == 0 and said(model, "Block runs uncompiled: not today.")
    assert torch.equal(model(inputs()), plain(inputs()))
    assert compile_count() == 1


# -- when something goes wrong


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
    for bundle in model.bundles:
        if bundle.block is not None:
            bundle.block.compute = None
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
        import sys
        sys.path[:0] = [{tests!r}]
        import pytest, torch
        import conftest, test_compile as t
        with torch.inference_mode():
            import pathlib
            model, plain = t.make.__wrapped__(pathlib.Path({folder!r}))(backend="inductor")
            assert torch.equal(model(t.inputs()), plain(t.inputs()))
        print(t.said(model, "compile failed; running uncompiled."))
    """
    tests = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program).format(tests=tests, folder=str(tmp_path))],
        env={**os.environ, "CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "/nowhere/c++" in done.stdout or "CppCompile" in done.stdout or "compiler" in done.stdout


# -- somebody else's torch.compile


@pytest.mark.parametrize("device", [None, SimDevice], ids=["cpu", "deferred"])
@pytest.mark.parametrize("blocks", [[], NAMES], ids=["layers", "blocks"])
def test_a_model_compiled_from_outside_is_right(tmp_path, device, blocks):
    """What another node does: torch.compile of the module, or of a part of it."""
    path = tmp_path / "net.safetensors"
    state = nets.write(path, Net())
    with nets.skip_model_initialization():
        module = Net()
    model = DynamicModel(module, DiskMap(path), "cpu", Policy(vram_bytes=0), backend=device and device(), blocks=blocks)
    plain = nets.plain(Net, state, torch.float32)
    whole = torch.compile(model.module, backend="eager")
    for batch in (2, 3, 1):
        assert torch.equal(whole(inputs(batch)), plain(inputs(batch)))
    model.set_patches({"blocks.1.gate": lambda weight: weight + 1})
    plain.blocks[1].gate += 1
    assert torch.equal(whole(inputs()), plain(inputs()))
    part = torch.compile(model.module.blocks[1], backend="eager")
    assert torch.equal(part(inputs()), plain.blocks[1](inputs()))
    assert said(model, "another node compiles this model")
