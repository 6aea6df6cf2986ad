"""Memory while a model is saved: a few parts of one weight, whatever the size of model and weight."""

import threading

import comfy.cli_args
import comfy.sd
import comfy.utils
import folder_paths
import psutil
import pytest
import torch

from kit.comfyui import checkpoints
from kit.comfyui.pairs import run
from kit.device import is_fake
from spillway.nodes.merge import SUM, SpillwayMergeModels
from spillway.nodes.save import SpillwaySaveDiffusionModel
from spillway.ops.files.disk_map import DiskMap
from spillway.patcher.comfyui.loading.load import load_diffusion_model
from spillway.patcher.comfyui.saving.save import SAVE_DTYPES

DEPTHS = {"depth": 1, "depth_single": 1}
LARGE, MIDDLE = 2048, 1024  # widths: 0.46 GB in bf16, of which one tensor has 59 MB, and a quarter of that
# Four bits are slow to make on a CPU. The small ones run always.
QUICK = [("as loaded", MIDDLE), ("fp8_e4m3fn scaled", MIDDLE)]
SLOW = [("as loaded", LARGE), ("fp8_e4m3fn scaled", LARGE), ("w4a8", MIDDLE), ("nvfp4", MIDDLE)]
SHARES = dict.fromkeys(("early", "middle", "late", "other"), -1.0)


class Peak:
    """How far the resident set grows while this is open."""

    def __enter__(self):
        self.process, self.stop = psutil.Process(), threading.Event()
        self.before = self.peak = self.process.memory_info().rss
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.stop.wait(0.002):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()

    @property
    def growth(self):
        return self.peak - self.before


class DevicePeak:
    """How far the memory of the fake device grows while this is open. It lies in the process, which says nothing."""

    def __enter__(self):
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_):
        self.growth = torch.cuda.max_memory_allocated() - self.before


@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        *(case for case in QUICK if case[0] in SAVE_DTYPES),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW if case[0] in SAVE_DTYPES),
    ],
)
def test_saving_takes_a_few_parts_of_one_weight(dtype, width, checkpoint, tmp_path, monkeypatch):
    """With a LoRA on every layer, merged with a second model; ComfyUI would hold both twice, in fp32.

    A device makes a weight as a whole: it, its patch, their product and the result, each in fp32 at most. In a model
    that is forced to fp32, the second model's weight and what is quantised take as much again as each of these.
    """
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    paths = [checkpoint("flux", hidden=width, **DEPTHS, seed=seed) for seed in (0, 1)]
    specs = [DiskMap(paths[0]).spec(key) for key in DiskMap(paths[0]).keys()]  # noqa: SIM118
    largest = max(spec.nbytes for spec in specs)
    share = (width / LARGE) ** 2
    assert largest > 50e6 * share and sum(spec.nbytes for spec in specs) > 400e6 * share
    lora = comfy.utils.load_torch_file(checkpoints.lora(tmp_path / "lora.safetensors", paths[0]))
    models = [comfy.sd.load_lora_for_models(load_diffusion_model(path), None, lora, 0.5, 0)[0] for path in paths]
    merged = SpillwayMergeModels.execute(*models, mode=SUM, ratio=0.25, **SHARES).args[0]
    small = load_diffusion_model(checkpoint("flux", hidden=128, **DEPTHS))
    SpillwaySaveDiffusionModel.execute(model=small, filename_prefix="warm", dtype=dtype)
    run(small, steps=1)
    copies = 6.1 if comfy.cli_args.args.force_fp32 else 4
    limit = copies * 2 * largest if is_fake() else 2 * largest + (64 << 20)
    with DevicePeak() if is_fake() else Peak() as peak:
        SpillwaySaveDiffusionModel.execute(model=merged, filename_prefix="x", dtype=dtype)
    assert 0 < peak.growth <= limit, f"grew by {peak.growth / 1e6:.0f} MB"
