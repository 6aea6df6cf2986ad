"""What two runs show is compared to its last frame, sample and number, and what is ours in both is named."""

import wave
from types import SimpleNamespace

import av
import folder_paths
import nodes as comfyui_nodes
import numpy as np
import pytest
import torch
from comfy_extras import nodes_audio, nodes_images, nodes_video
from PIL import Image
from safetensors.torch import save_file

from spillway.nodes import compare, compare_text
from spillway.nodes.compare_files import Shown, compared, in_sentences, shown_files

FRAMES = 5
NONE = {"count": 0, "frames": 0, "equal": 0, "most": 0, "other": 0}


def pictures(change, frames=FRAMES):
    """Frames of which the last one has another blue."""
    found = [np.full((16, 16, 3), 40 * place, np.uint8) for place in range(frames)]
    found[-1][3, 4, 2] += change
    return [Image.fromarray(one) for one in found]


def animation(path, change=0, frames=FRAMES):
    first, *rest = pictures(change, frames)
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=rest, duration=50, **lossless)


def video(path, change=0, frames=FRAMES):
    with av.open(str(path), "w") as made:
        stream = made.add_stream("ffv1" if path.suffix == ".mkv" else "libx264rgb", rate=8)
        stream.width = stream.height = 16
        stream.pix_fmt = "bgr0" if path.suffix == ".mkv" else "rgb24"
        stream.options = {} if path.suffix == ".mkv" else {"qp": "0"}
        for picture in pictures(change, frames):
            made.mux(stream.encode(av.VideoFrame.from_image(picture)))
        made.mux(stream.encode())


def sound(path, change=0, frames=FRAMES):
    samples = np.arange(8000 * frames // FRAMES, dtype=np.int16)
    samples[-1] += change
    with wave.open(str(path), "wb") as made:
        made.setnchannels(1)
        made.setsampwidth(2)
        made.setframerate(8000)
        made.writeframes(samples.tobytes())


def latent(path, change=0, frames=FRAMES):
    numbers = torch.arange(float(frames * 8)).reshape(frames, 8)
    numbers[-1, -1] += change
    save_file({"latent_tensor": numbers, "latent_format_version_0": torch.tensor([])}, str(path))


MADE = {
    ".png": (animation, "pictures", 6),
    ".webp": (animation, "pictures", 6),
    ".mkv": (video, "pictures", 6),
    ".wav": (sound, "sounds", 6),
    ".latent": (latent, "latents", 0.5),
}


@pytest.mark.parametrize("ending", MADE)
def test_a_difference_at_the_very_end_is_seen(tmp_path, ending):
    make, kind, change = MADE[ending]
    paths = [tmp_path / f"{name}{ending}" for name in ("first", "same", "other", "longer")]
    for path, (differs, frames) in zip(paths, [(0, 5), (0, 5), (change, 5), (0, 6)], strict=True):
        make(path, differs, frames)
    first, *others = [[Shown("9", 0, str(path))] for path in paths]
    same, other, longer = (compared(first, one) for one in others)
    assert same[kind]["count"] == same[kind]["equal"] == 1
    assert kind != "pictures" or same[kind]["frames"] == FRAMES
    most = change / 2**15 if kind == "sounds" else change
    assert (other[kind]["equal"], other[kind]["most"], other[kind]["other"]) == (0, most, 0)
    assert (longer[kind]["equal"], longer[kind]["other"]) == (0, 1), "one of them goes on"
    assert compared(first, [])[kind] == {**NONE, "count": 1, "frames": 1, "other": 1}, "in one run alone"
    rest = {name: same[name] for name in ("pictures", "sounds", "latents") if name != kind}
    assert all(one == NONE for one in rest.values()) and same["left"] == []


def test_numbers_that_are_none_are_equal_to_themselves_alone(tmp_path):
    paths = [tmp_path / f"{name}.latent" for name in range(3)]
    for path, number in zip(paths, (float("nan"), float("nan"), 1.0), strict=True):
        save_file({"latent_tensor": torch.tensor([number])}, str(path))
    first, second, third = ([Shown("9", 0, str(path))] for path in paths)
    assert compared(first, second)["latents"]["equal"] == 1
    assert compared(first, third)["latents"] == {**NONE, "count": 1, "frames": 1, "other": 1}


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_compared(tmp_path, caplog):
    animation(tmp_path / "good.png")
    for name in ("broken.png", "broken.mkv", "broken.latent"):
        (tmp_path / name).write_bytes(b"no such thing")
    shown = [Shown("9", place, str(path)) for place, path in enumerate(sorted(tmp_path.iterdir()))]
    told = compared(shown, shown)
    assert told["left"] == ["broken.latent (9)", "broken.mkv (9)", "broken.png (9)"]
    assert told["pictures"]["count"] == told["pictures"]["equal"] == 1 and told["latents"] == NONE
    assert "broken.mkv cannot be read" in caplog.text


def test_every_list_of_files_that_a_node_shows_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_directory_by_type", {"temp": str(tmp_path)}.get)
    entry = lambda name: {"filename": name, "subfolder": "", "type": "temp"}  # noqa: E731
    outputs = {
        "1": {"images": [entry("a.webp"), entry("b.webp")], "animated": (True,)},
        "2": {"audio": [entry("c.flac")]},
        "3": {"latents": [entry("d.latent")], "text": ("none",)},
        "4": {"gifs": [entry("e.mp4"), {"filename": "f.mp4", "type": "elsewhere"}]},
        "5": {"3d": [entry("mesh.glb")]},
    }
    found = shown_files({"outputs": outputs})
    assert [(one.node, one.place, one.path.rpartition("/")[2]) for one in found] == [
        ("1", 0, "a.webp"),
        ("1", 1, "b.webp"),
        ("2", 0, "c.flac"),
        ("3", 0, "d.latent"),
        ("4", 0, "e.mp4"),
        ("5", 0, "mesh.glb"),
    ]
    mesh = [one for one in found if one.node == "5"]
    told = compared(mesh, mesh)
    assert told["left"] == ["mesh.glb (5)"]
    assert in_sentences(told)[0] == "The graph shows nothing that could be compared."
    assert "Not compared" in in_sentences(told)[1] and "mesh.glb (5)" in in_sentences(told)[1]


def test_it_is_said_in_words():
    told = {
        "pictures": {"count": 2, "frames": 50, "equal": 2, "most": 0, "other": 0},
        "sounds": {"count": 3, "frames": 3, "equal": 1, "most": 0.01234, "other": 1},
        "latents": {"count": 1, "frames": 1, "equal": 0, "most": 0.5, "other": 0},
    }
    assert in_sentences(told) == [
        "Pictures: 2 of 2 are equal, pixel by pixel, in all their 50 frames.",
        "Sounds: 1 of 3 are equal; others differ by up to 0.0123 of full scale, and 1 are in one run alone or have "
        "another size or length.",
        "Latents: 0 of 1 are equal; others differ by up to 0.5.",
    ]


def test_what_is_ours_in_both_runs_is_named(monkeypatch):
    """What stands beside loaders too; not what no output needs."""
    ours = {
        name: type(name, (compare.CheckedNode,), {"OUTPUT_NODE": False})
        for name in ("OursLoads", "OursBeside", "OursAlone")
    }
    theirs = {"Theirs": type("Theirs", (), {}), "Shows": type("Shows", (), {"OUTPUT_NODE": True})}
    for name, node in {**ours, **theirs}.items():
        monkeypatch.setitem(compare.comfyui_nodes.NODE_CLASS_MAPPINGS, name, node)
    monkeypatch.setitem(compare.comfyui_nodes.NODE_DISPLAY_NAME_MAPPINGS, "OursBeside", "Beside (Spillway)")
    prompt = {
        "1": {"class_type": "OursLoads", "inputs": {"size": [1, 2]}},
        "2": {"class_type": "OursBeside", "inputs": {"model": ["1", 0], "back": ["4", 0]}},
        "3": {"class_type": "OursAlone", "inputs": {"model": ["1", 0]}},
        "4": {"class_type": "Theirs", "inputs": {"model": ["2", 0], "text": "a"}},
        "5": {"class_type": "Shows", "inputs": {"images": ["4", 0]}},
    }
    assert compare.ours_in(prompt) == ["OursLoads #1", "Beside (Spillway) #2"]


def test_the_slowest_nodes_of_both_runs_are_told_with_both_names():
    theirs, ours = (compare.Run(name) for name in compare.KINDS)
    theirs.nodes = {"1": ("UNETLoader", 2.0), "7": ("KSampler", 12.5)}
    ours.nodes = {"1": ("SpillwayLoadDiffusionModel", 0.25), "7": ("KSampler", 9.0), "8": ("VAEDecode", 1.0)}
    comparison = SimpleNamespace(runs=dict(zip(compare.KINDS, (theirs, ours), strict=True)))
    assert compare_text.node_rows(comparison) == [
        ("KSampler #7", "12.50", "9.00"),
        ("Load Diffusion Model / SpillwayLoadDiffusionModel #1", "2.00", "0.25"),
        ("VAE Decode #8", "-", "1.00"),
    ]
    lines = compare_text.table(list(compare.KINDS), [("seconds", "1.0", "2.0"), ("a longer name", "3.0", "4.0")])
    assert len({len(line) for line in lines}) == 1, "columns stand below one another"


def test_what_comfyuis_own_nodes_save_is_found_and_read(tmp_path, monkeypatch):
    """An animation, a video, sound and a latent, in the form in which this ComfyUI's nodes tell of them."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    frames = torch.rand(FRAMES, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    sound = {"waveform": torch.rand(1, 2, 4000) - 0.5, "sample_rate": 8000}
    for node in (nodes_video.SaveWEBM, nodes_audio.SaveAudio):  # what ComfyUI gives a node that runs
        monkeypatch.setattr(node, "hidden", SimpleNamespace(prompt=None, extra_pnginfo=None))
    webp = {"fps": 8.0, "filename_prefix": "a", "lossless": True, "quality": 80, "method": "default"}
    outputs = {
        "1": nodes_images.SaveAnimatedWEBP.execute(frames, **webp).ui,
        "2": nodes_video.SaveWEBM.execute(frames, codec="vp9", fps=8.0, filename_prefix="b", crf=32.0).ui,
        "3": nodes_audio.SaveAudio.execute(sound, "c").ui,
        "4": comfyui_nodes.SaveLatent().save({"samples": torch.rand(1, 4, 8, 8)}, "d")["ui"],
    }
    outputs = {node: ui if isinstance(ui, dict) else ui.as_dict() for node, ui in outputs.items()}
    found = shown_files({"outputs": outputs})
    told = compared(found, found)
    assert told["left"] == [] and told["pictures"] == {**NONE, "count": 2, "frames": 2 * FRAMES, "equal": 2}
    assert told["sounds"]["count"] == told["sounds"]["equal"] == told["latents"]["equal"] == 1


@pytest.mark.parametrize("words", [("", "/etc/x.png"), ("..", "x.png"), ("a/../..", "x.png"), ("", "\\\\host\\x.png")])
def test_what_lies_outside_of_comfyuis_folders_is_not_read(words, tmp_path, monkeypatch):
    """A prompt can have a node show any words."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    (tmp_path / "output").mkdir()
    subfolder, name = words
    shown = {"outputs": {"1": {"images": [{"filename": name, "subfolder": subfolder, "type": "output"}]}}}
    assert all(one.path.startswith(str(tmp_path / "output")) for one in shown_files(shown))
    (tmp_path / "output" / "link.png").symlink_to("/etc/hostname")
    shown["outputs"]["1"]["images"] = [{"filename": "link.png", "subfolder": "", "type": "output"}]
    assert shown_files(shown) == []


def test_a_comparison_is_done_when_it_has_been_compared(monkeypatch):
    """Videos take long. Whoever asked meanwhile would take what is not there for the answer."""
    runs = {
        kind: SimpleNamespace(state="done", seconds=1.0, files=[], nodes={}, peaks={}, prompt_id=kind) for kind in "ab"
    }
    comparison, states = SimpleNamespace(runs=runs, shown=None, queue=None), []
    runs["b"].state = "runs"
    monkeypatch.setattr(compare, "compared", lambda *_: states.append(runs["b"].state) or {"left": []})
    monkeypatch.setattr(compare.run_record, "last_run", lambda: None)
    compare._end(comparison, runs["b"], SimpleNamespace(success=True, history_result={}))
    assert states == ["runs"] and runs["b"].state == "done" and comparison.shown == {"left": []}
