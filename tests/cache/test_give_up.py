"""Memory goes back at once, and never that of a tensor that somebody else holds."""

import pytest
import torch

from spillway.cache.give_up import LARGE, Grip

SIZE = LARGE // 4


def made():
    return torch.ones(SIZE)


def made_by_a_node():
    with torch.inference_mode():
        return torch.ones(SIZE)


@pytest.mark.parametrize("make", [made, made_by_a_node])
def test_memory_that_nobody_else_holds_goes(make):
    value = [[make(), {"a": (make()[5:],)}]]
    tensors = {"whole": value[0][0].detach(), "view": value[0][1]["a"][0].detach()}
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    addresses = [storage._cdata for storage in storages]
    del storages, tensors
    grip = Grip(value)
    held = list(grip._held.values())
    assert [tensor.untyped_storage()._cdata for tensor in held] == addresses
    held.clear()
    seen = []
    empty = torch.ops.inductor.resize_storage_bytes_

    class Watched:
        def resize_storage_bytes_(self, tensor, size):
            empty(tensor, size)
            seen.append(tensor.untyped_storage().nbytes())

    del value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops, "inductor", Watched())
        grip.let_go()
    assert seen == [0, 0]


OTHERS = {
    "the tensor": lambda tensor: tensor,
    "a view": lambda tensor: tensor[3:].view(-1),
    "another tensor": lambda tensor: tensor.detach(),
    "a storage": lambda tensor: tensor.untyped_storage(),
    "an array": lambda tensor: tensor.numpy(),
    "a memoryview": lambda tensor: memoryview(tensor.numpy()),
    "a capsule": lambda tensor: torch.utils.dlpack.to_dlpack(tensor),
    "what autograd saved": lambda tensor: (torch.ones(1, requires_grad=True) * tensor).sum(),
    "a parameter": lambda tensor: torch.nn.Parameter(tensor, requires_grad=False),
    "a list": lambda tensor: [tensor],
}


def numbers(kind, other):
    if kind == "a capsule":
        other = torch.utils.dlpack.from_dlpack(other)
    if kind == "a list":
        (other,) = other
    if kind == "a storage":
        other = torch.empty(0).set_(other)
    if kind == "what autograd saved":
        return other.grad_fn.next_functions[0][0]._saved_other
    return torch.as_tensor(other)


@pytest.mark.parametrize("kind", OTHERS)
def test_what_somebody_else_holds_stays(kind):
    tensor = made()
    other = OTHERS[kind](tensor)
    value = [[tensor]]
    del tensor
    grip = Grip(value)
    del value
    grip.let_go()
    left = numbers(kind, other)
    assert left.numel() >= SIZE - 3 and bool((left == 1).all())


def test_numpys_memory_is_left_to_numpy():
    import numpy

    array = numpy.ones(SIZE, dtype=numpy.float32)
    value = [torch.from_numpy(array)]
    grip = Grip(value)
    del value
    grip.let_go()
    assert (array == 1).all()


def test_what_is_small_or_strange_is_no_matter():
    loop = [torch.ones(1), torch.ones(SIZE, device="meta"), torch.eye(3).to_sparse(), "text", None]
    loop.append(loop)
    Grip(loop).let_go()
