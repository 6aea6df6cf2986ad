"""Tests that run inside a real ComfyUI.

find_comfyui.py says where ComfyUI is looked for. Without one every file of this folder collapses into a single skipped
test, and the summary says so. SPILLWAY_REQUIRE_HOST=1 turns that into an error, for machines where a silent skip would
be a lie.
"""

import gc
import hashlib
import os
from pathlib import Path

import pytest

from kit.comfyui.start import BASE, COMFYUI, MISSING  # before torch is used

HERE = Path(__file__).resolve().parent


# --- pytest hooks -----------------------------------------------------------------------------------------------------


class _Skipped(pytest.Item):
    def runtest(self):
        pytest.skip(f"TESTS IN COMFYUI NOT RUN: {MISSING}")

    def reportinfo(self):
        return self.path, None, f"tests of {self.path.name}"


class _SkippedFile(pytest.File):
    def collect(self):
        yield _Skipped.from_parent(self, name="needs_comfyui")


def pytest_pycollect_makemodule(module_path, parent):
    """Stand in for each test file where ComfyUI is missing: the file itself cannot be imported then."""
    if MISSING:
        return _SkippedFile.from_parent(parent, path=module_path)
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("comfyui")


def pytest_terminal_summary(terminalreporter):
    if MISSING:
        terminalreporter.section("TESTS IN COMFYUI NOT RUN", sep="!", red=True, bold=True)
        terminalreporter.line(MISSING)
    else:
        import comfyui_version
        import torch

        terminalreporter.line(
            f"tests in ComfyUI {comfyui_version.__version__} in {COMFYUI}, torch "
            f"{torch.__version__}, {torch.get_num_threads()} threads"
        )


# --- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def as_in_a_prompt():
    """Inference mode as in ComfyUI's executor; afterwards nothing stays loaded and no interrupt stays pending."""
    import comfy.model_management
    import torch

    with torch.inference_mode():
        yield
    comfy.model_management.interrupt_current_processing(False)
    comfy.model_management.unload_all_models()
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def a_small_heap():
    """Freeze what imports and earlier files left, or each collection after a test would look at millions of objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def nothing_is_learnt():
    """Forget what earlier files have shown: the order in which layers run, how long they take and what runs compute in.

    A run of the same model at the same size would go by it.
    """
    from spillway.patcher.comfyui.first_use import orders_file
    from spillway.patcher.comfyui.forecast import learnt

    for path in (orders_file(), *map(learnt.learnt_file, (learnt.PEAKS, learnt.PACES, learnt.BUSES, learnt.WAITS))):
        path.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def models_dir():
    """The models folder of this session's ComfyUI; every folder that ComfyUI knows exists in it."""
    return BASE / "models"


@pytest.fixture(scope="session")
def checkpoint(models_dir):
    """``checkpoint("flux", hidden=512)``: the path of such a file, written once a session.

    The name is a function of checkpoints, the keywords are that function's.
    """
    from kit.comfyui import checkpoints

    folder = models_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)

    def make(kind, **options):
        digest = hashlib.sha256(repr(sorted(options.items())).encode()).hexdigest()[:10]
        path = folder / f"{kind}-{digest}.safetensors"
        if not path.exists():
            getattr(checkpoints, kind)(path, **options)
        return str(path)

    return make


@pytest.fixture
def weights_in_layers():
    """Let ComfyUI's layers have weights when they are made, with dynamic VRAM too, for tests that make them by hand."""
    from kit.comfyui.on_device import weights_at_once

    with weights_at_once():
        yield


@pytest.fixture
def in_fp32(monkeypatch):
    """Let models compute in fp32 on a device that would take 16 bit, for tests in which a file's numbers come out."""
    import comfy.model_management
    import torch

    for name in ("unet_dtype", "lora_compute_dtype"):
        monkeypatch.setattr(comfy.model_management, name, lambda *_, **__: torch.float32)


@pytest.fixture
def flux(checkpoint):
    """A Flux of 2 MB."""
    from kit.comfyui.pairs import SMALL

    return checkpoint("flux", **SMALL)


@pytest.fixture(scope="session")
def quantised_file(checkpoint, models_dir):
    """``quantised_file("int8_tensorwise")``: the small Flux with its large matrices in that format."""
    import comfy.quant_ops

    from kit.comfyui.pairs import SMALL
    from kit.comfyui.quantised import quantised, scaled_fp8

    base = checkpoint("flux", **SMALL)

    def make(kind):
        if kind != "scaled_fp8" and kind not in comfy.quant_ops.QUANT_ALGOS:
            pytest.skip(f"this ComfyUI has no {kind}")
        path = models_dir / "diffusion_models" / f"{kind}.safetensors"
        if path.exists():
            return str(path)
        return scaled_fp8(path, base) if kind == "scaled_fp8" else quantised(path, base, kind)

    return make


@pytest.fixture
def output(tmp_path, monkeypatch):
    import folder_paths

    from spillway.patcher.comfyui.saving.target import journal

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    yield tmp_path
    left = [path.name for path in tmp_path.rglob("*") if "spillway-" in path.name]
    assert not left and not (journal().is_dir() and os.listdir(journal()))
