"""Faults in the formats of 8 and 4 bits, planted one at a time: a test fails for each.

The engine's are in tests/lending/test_planted_faults.py. Both run with `dev.py test --slow`.
"""

import functools

import pytest

from kit.planting import Fault, check_is_seen, check_passes

QUANTISE = "patcher.comfyui.quantise"
ATTACH = "patcher.comfyui.attach_patches"
FORMATS = "comfyui/quantise/test_formats.py"
IN_PARTS = f"{FORMATS}::test_weights_made_in_parts_are_comfyuis_own"
SAVED = f"{FORMATS}::test_a_saved_format_is_what_is_multiplied_on_the_fly"
MODELS = "comfyui/quantise/test_models.py"
ON_FILES = "comfyui/quantise/test_loras_on_files.py"
BESIDE = f"{ON_FILES}::test_a_lora_beside_a_file_is_as_exact_as_on_the_fly"
SCALES = f"{ON_FILES}::test_the_scale_of_an_input_that_a_file_has_holds_with_a_lora"

FAULTS = {
    "a scale of some rows alone": Fault(
        f"{QUANTISE}.making:Making.look", "torch.maximum(self._largest.to(rows), largest)", "largest", (IN_PARTS,)
    ),
    "rows are rotated in 16 bits": Fault(f"{QUANTISE}.making:Making.make", "rows = rows.float()", "pass", (IN_PARTS,)),
    "a file does not say that it is rotated": Fault(
        f"{QUANTISE}.layouts:Form.conf", '"convrot": True, ', "", (f"{SAVED}[int8_convrot]",)
    ),
    "the input stays in 16 bits": Fault(
        f"{QUANTISE}.weight:KitchenWeight.linear",
        "if self.form.quantises_input",
        "if False",
        (f"{MODELS}::test_a_device_multiplies_as_with_a_file_in_the_format",),
    ),
    "auto takes the smallest": Fault(
        f"{QUANTISE}.choose:most_exact",
        "if size <= room",
        "if False",
        (f"{MODELS}::test_auto_takes_the_most_exact_that_fits",),
    ),
    "a branch is left empty": Fault(
        "ops.lending.final_form:_fill_branch", "view.up.copy_(up)", "view.up.zero_()", (f"{BESIDE}[dequantised-nvfp4]",)
    ),
    "a LoRA is merged into a file's 4 bits": Fault(
        f"{ATTACH}:form_in_file", "form.bits < FEWEST_MERGED", "False", (f"{BESIDE}[dequantised-nvfp4]",)
    ),
    "a layer multiplies plainly once it has a LoRA": Fault(
        f"{ATTACH}:form_in_file", "not plainly and", "False and", (f"{BESIDE}[multiplied-nvfp4]",)
    ),
    "ComfyUI's op quantises the input too": Fault(
        f"{ATTACH}:set_weight_functions", "module.layout_type, None))", "None, module.layout_type))", (BESIDE,)
    ),
    "the scale of an input is found anew": Fault(
        f"{QUANTISE}.weight:form_of", "float(as_stored(scale))", "None", (SCALES,)
    ),
}

passes = functools.cache(check_passes)


@pytest.mark.planted
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_seen(fault):
    """And its tests pass without it."""
    print(check_is_seen(fault))
    passes(fault.tests)
