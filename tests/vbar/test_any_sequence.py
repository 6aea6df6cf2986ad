"""Any sequence of operations on two VBARs, against the model of what they promise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.nets import steady
from kit.vbar_devices import DEVICES, software_vbar
from kit.vbar_model import Model

SLICE = st.integers(0, len(Model.sizes) - 1)
VBAR = st.integers(0, 1)
# How often each is drawn, and with what. A failing sequence shrinks to nothing but the operations that it takes.
OPERATIONS = {
    "nothing": (1, ()),
    "fault": (10, (VBAR, SLICE)),
    "unpin": (6, (VBAR, SLICE)),
    "free_memory": (2, (VBAR, st.sampled_from([0.5, 1, 2, 5, 14]))),
    "set_limit": (2, (VBAR, st.sampled_from([None, None, 1.5, 4, 6, 9, 0]))),
    "others_take": (1, (st.integers(0, 16),)),
    "prioritize": (3, (VBAR,)),
    "deprioritize": (1, (VBAR,)),
    "replace": (1, (VBAR,)),
}
NAMES = st.sampled_from([name for name, (times, _) in OPERATIONS.items() for _ in range(times)])


@st.composite
def operation(draw):
    name = draw(NAMES)
    return name, *[draw(argument) for argument in OPERATIONS[name][1]]


@pytest.mark.parametrize("make_device", DEVICES, ids=lambda device: device.__name__)
@steady
@given(st.lists(operation(), min_size=25, max_size=75))
def test_any_sequence_of_operations_keeps_the_promises(make_device, operations):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(software_vbar, "POLL_SECONDS", 0)
        models = Model(make_device)
        try:
            for name, *arguments in operations:
                getattr(models, name)(*arguments)
                models.check()
        finally:
            models.close()
    models.device.check_after()
