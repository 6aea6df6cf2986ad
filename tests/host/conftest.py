"""Tests that run inside a real ComfyUI.

ComfyUI is looked for in ``$COMFYUI_PATH``, then around the pack itself (``<ComfyUI>/custom_nodes/<pack>``), then in
``~/comfy/ComfyUI``.  Without one every file of this folder collapses into a single skipped test, and the summary says
so; ``SPILLWAY_REQUIRE_HOST=1`` turns that into an error, for machines where a silent skip would be a lie.

Everything here must happen before torch is first used: MKL picks its code path at its first call, and without
``MKL_CBWR=AUTO`` an fp32 product depends on the alignment of its buffers, which would make "bit for bit" a lottery.
"""

import atexit
import gc
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
THREADS = 2

os.environ["MKL_CBWR"] = "AUTO"
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = str(THREADS)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads cost several times as much on a busy machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")


def _is_comfyui(folder):
    return all((folder / name).is_file() for name in ("comfy/sd.py", "nodes.py", "folder_paths.py"))


def _find_comfyui():
    """(folder, None), or (None, why there is none)."""
    wanted = os.environ.get("COMFYUI_PATH")
    if wanted:  # an explicit wish is never quietly replaced by another installation
        folder = Path(wanted).expanduser().resolve()
        return (folder, None) if _is_comfyui(folder) else (None, f"COMFYUI_PATH={wanted} holds no ComfyUI")
    # the pack may be a link in custom_nodes: look both where it was found and where it lies
    for place in (ROOT, Path(os.path.abspath(__file__)).parents[2]):
        if place.parent.name == "custom_nodes" and _is_comfyui(place.parent.parent):
            return place.parent.parent, None
    default = Path.home() / "comfy" / "ComfyUI"
    if _is_comfyui(default):
        return default, None
    return None, "no ComfyUI found: set COMFYUI_PATH, or install the pack in ComfyUI's custom_nodes"


def _put_first_on_path(comfy_root):
    """ComfyUI's own top-level modules (`nodes`, `server`, ...) must win over anything in this repository."""

    def keep(entry):
        try:
            return Path(entry).resolve() not in (ROOT, comfy_root)
        except OSError:
            return True

    sys.path[:] = [str(comfy_root), *filter(keep, sys.path)]
    if str(HERE) not in sys.path:
        sys.path.append(str(HERE))  # for `import checkpoints` and `import sampling`
    known = sys.modules.get("nodes")
    if known is not None and Path(getattr(known, "__file__", None) or "/").resolve().parent != comfy_root:
        raise pytest.UsageError(f"a module named `nodes` that is not ComfyUI's is already imported: {known!r}")


def _start_core(comfy_root, base):
    """Import the core the way ``main.py --cpu`` would have set it up.  None, or why it cannot be imported."""
    import fake_device.comfyui

    try:
        on_fake_device = fake_device.comfyui.prepare()
        import comfy.cli_args
    except ImportError as error:
        return f"{comfy_root} cannot be imported with {sys.executable}: {error}"
    comfy.cli_args.args.cpu = not on_fake_device
    comfy.cli_args.args.base_directory = str(base)  # models, input, output, temp and user folders
    try:
        import comfy.sample
        import comfy.sd
        import folder_paths
        import torch
    except ImportError as error:
        return f"{comfy_root} cannot be imported with {sys.executable}: {error}"

    if on_fake_device:
        fake_device.comfyui.finish()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True, warn_only=True)  # this also fills torch.empty with NaN
    for folders, _extensions in folder_paths.folder_names_and_paths.values():
        for folder in folders:
            if Path(folder).is_relative_to(base):
                os.makedirs(folder, exist_ok=True)
    for folder in (
        folder_paths.get_output_directory(),
        folder_paths.get_temp_directory(),
        folder_paths.get_input_directory(),
        folder_paths.get_user_directory(),
    ):
        os.makedirs(folder, exist_ok=True)

    import checkpoints

    checkpoints.accept_small_lumina()
    return None


BASE = None
COMFYUI, MISSING = _find_comfyui()
if COMFYUI is not None:
    _put_first_on_path(COMFYUI)
    BASE = Path(tempfile.mkdtemp(prefix="spillway-host-"))
    atexit.register(shutil.rmtree, BASE, ignore_errors=True)  # up to some GB: never left to pytest's kept folders
    MISSING = _start_core(COMFYUI, BASE)
if MISSING and os.environ.get("SPILLWAY_REQUIRE_HOST", "0") not in ("", "0"):
    raise pytest.UsageError(f"SPILLWAY_REQUIRE_HOST is set, but {MISSING}")


# --- pytest hooks -----------------------------------------------------------------------------------------------------


def pytest_configure(config):
    config.addinivalue_line("markers", "host: runs inside a real ComfyUI (added to all of tests/host)")
    config.addinivalue_line("markers", "slow: takes tens of seconds, or gigabytes")


class _Skipped(pytest.Item):
    def runtest(self):
        pytest.skip(f"HOST TESTS NOT RUN: {MISSING}")

    def reportinfo(self):
        return self.path, None, f"host tests of {self.path.name}"


class _SkippedFile(pytest.File):
    def collect(self):
        yield _Skipped.from_parent(self, name="needs_comfyui")


def pytest_pycollect_makemodule(module_path, parent):
    """Without a host the test files cannot even be imported: stand in for each of them."""
    if MISSING:
        return _SkippedFile.from_parent(parent, path=module_path)
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("host")


def pytest_terminal_summary(terminalreporter):
    if MISSING:
        terminalreporter.section("HOST TESTS NOT RUN", sep="!", red=True, bold=True)
        terminalreporter.line(MISSING)
    else:
        import comfyui_version
        import torch

        terminalreporter.line(
            f"host tests: ComfyUI {comfyui_version.__version__} in {COMFYUI}, torch "
            f"{torch.__version__}, {torch.get_num_threads()} threads"
        )


# --- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def as_in_a_prompt():
    """Inference mode as in the core's executor; afterwards nothing stays loaded and no interrupt stays pending."""
    import comfy.model_management
    import torch

    with torch.inference_mode():
        yield
    comfy.model_management.interrupt_current_processing(False)
    comfy.model_management.unload_all_models()
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def a_small_heap():
    """What imports and earlier files left lasts: a collection after every test need not look at millions of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def models_dir():
    """The models folder of this session's ComfyUI; every folder the core knows exists in it."""
    return BASE / "models"


@pytest.fixture(scope="session")
def checkpoint(models_dir):
    """``checkpoint("flux", hidden=512)``: the path of such a file, written once a session.

    The name is a function of checkpoints, the keywords are that function's.
    """
    import checkpoints
    import fake_device.comfyui

    folder = models_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)

    def make(kind, **options):
        digest = hashlib.sha256(repr(sorted(options.items())).encode()).hexdigest()[:10]
        path = folder / f"{kind}-{digest}.safetensors"
        if not path.exists():
            with fake_device.comfyui.weights_at_once():
                getattr(checkpoints, kind)(path, **options)
        return str(path)

    return make
