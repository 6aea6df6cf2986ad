"""Host memory that is used again: no two holders share it, it does not grow, and it goes back."""

import threading

import pytest
import torch

from spillway.ops.gguf.types import IDS, TYPES
from spillway.ops.gguf.weight import Form, GgufWeight
from spillway.ops.ram.scratch import numbers

ROWS, COLUMNS = 96, 512


@pytest.fixture(autouse=True)
def _none_before():
    numbers.release()
    yield
    numbers.release()


def weight(kind="Q8_0"):
    count = ROWS * COLUMNS // TYPES[IDS[kind]].numbers
    block = torch.zeros(count, TYPES[IDS[kind]].nbytes, dtype=torch.uint8)
    block[:, :2] = torch.tensor([0.5], dtype=torch.float16).view(torch.uint8)
    block[:, 2:] = torch.randint(0, 255, (count, block.shape[1] - 2), dtype=torch.uint8)
    return GgufWeight(block, Form(kind, (ROWS, COLUMNS), torch.float32))


def test_memory_is_lent_again_and_to_one_at_a_time():
    with numbers.lent((4, 8), torch.float32) as one, numbers.lent((2, 8), torch.float32) as other:
        assert one.shape == (4, 8) and one.data_ptr() != other.data_ptr()
        places = {one.data_ptr(), other.data_ptr()}
    with numbers.lent((2, 8), torch.float32) as again:
        assert again.data_ptr() == other.data_ptr()  # the smallest that is large enough
        with numbers.lent((4, 8), torch.float32) as larger:
            assert {again.data_ptr(), larger.data_ptr()} == places


def test_what_is_kept_does_not_grow_with_the_sizes_asked_for():
    for nbytes in (100, 300, 200, 5000, 50):
        with numbers.lent((nbytes,), torch.uint8):
            pass
    assert numbers.release() == 5000 and numbers.release() == 0


def test_memory_of_a_failed_operation_is_lent_again():
    with pytest.raises(ValueError, match="failed"), numbers.lent((10,), torch.uint8):
        raise ValueError("failed")
    assert numbers.release() == 10


def test_a_product_of_blocks_makes_its_numbers_there_and_leaves_nothing_of_it_in_the_result():
    one, other = weight(), weight()
    x = torch.randn(3, COLUMNS)
    with torch.inference_mode():
        result, expected = one.linear(x), torch.nn.functional.linear(x, one.dequantize())
        other.linear(x)  # its numbers lie where those of the first did
        assert torch.equal(result, expected)
        assert numbers.release() == ROWS * COLUMNS * 4


def test_numbers_that_a_gradient_needs_are_left_alone():
    x = torch.randn(3, COLUMNS, requires_grad=True)
    one, other = weight(), weight()
    result = one.linear(x)
    with torch.no_grad():
        other.linear(x)
    result.sum().backward()
    assert torch.equal(x.grad, one.dequantize().sum(0).expand_as(x))


def test_threads_get_right_products():
    weights = [weight() for _ in range(4)]
    x = torch.randn(2, COLUMNS)
    expected = [torch.nn.functional.linear(x, one.dequantize()) for one in weights]
    wrong = []

    def work(place):
        with torch.inference_mode():
            for _ in range(50):
                if not torch.equal(weights[place].linear(x), expected[place]):
                    wrong.append(place)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert numbers.release() <= 4 * ROWS * COLUMNS * 4
