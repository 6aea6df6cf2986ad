"""Blocks compiled with their weights lifted out: right at any residency, and compiled once."""

import pytest
import torch

from kit import nets
from kit.compiled_net import NAMES, WIDTH, Block, Net, inputs, nothing_lent, said
from kit.sim_device import SimDevice
from spillway.ops.compile.compiled_function import compile_count
from spillway.ops.files.disk_map import DiskMap
from spillway.patcher.dynamic_model import DynamicModel
from spillway.patcher.policy import Policy

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


@pytest.mark.parametrize("equal", [(7, 7), (WIDTH, WIDTH)])
def test_sizes_that_are_equal_by_chance_are_no_rule(make, equal):
    """A first call with as many pictures as tokens says nothing of the next."""
    model, plain = make()
    model(inputs(*equal))
    for batch, length in ((3, 5), (5, 3), (WIDTH, 4), (4, WIDTH)):
        assert torch.equal(model(inputs(batch, length)), plain(inputs(batch, length)))
    assert model.ledger.counters.graphs_compiled == compile_count() == 1


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
