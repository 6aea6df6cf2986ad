"""Two ComfyUI servers with models, settings and outputs of their own, and one store: a folder, or a bucket of S3."""

import copy
import json
import os
import time

import numpy as np
import pytest
import safetensors.torch
import torch

from kit.comfyui.running_server import Server, node
from kit.s3_server import BUCKET, S3Server
from kit.store_servers import StoreServer

KEY = "correct horse"
FLUX = {"hidden": 128, "depth": 1, "depth_single": 1, "context": 768, "pooled": 768}  # as wide as CLIP-L
OFF = {"Spillway.Store.Seconds": 0, "Spillway.Store.Key": KEY, "Spillway.Store.WaitSeconds": 20}


def graph(text, seed=3):
    """A picture of a diffusion model and text encoder from files of their own, and its latents as a file."""
    return {
        "model": node("UNETLoader", unet_name="flux.safetensors", weight_dtype="default"),
        "vae": node("VAELoader", vae_name="flux.safetensors"),
        "clip": node("CLIPLoader", clip_name="clip.safetensors", type="stable_diffusion"),
        "positive": node("CLIPTextEncode", clip=["clip", 0], text=text),
        "negative": node("CLIPTextEncode", clip=["clip", 0], text=""),
        "empty": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "sampler": node(
            "KSampler",
            model=["model", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["empty", 0],
            seed=seed,
            steps=2,
            cfg=1.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "image": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "picture": node("SaveImage", images=["image", 0], filename_prefix="picture"),
        "latents": node("SaveLatent", samples=["sampler", 0], filename_prefix="latents"),
    }


class Machine:
    """A server whose models lie in folders of its own, and files of the store's settings."""

    def __init__(self, base, files, **variables):
        base.mkdir()
        self.base = base
        for name, path in files.items():
            (base / "models" / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, base / "models" / f"{name}.safetensors")
        self.settings = base / "user" / "default" / "comfy.settings.json"
        self.settings.parent.mkdir(parents=True)
        self.settings.write_text(json.dumps(OFF))
        self.server = Server(base, **variables)

    def use(self, address, **options):
        told = {f"Spillway.Store.{name}": value for name, value in options.items()}
        self.settings.write_text(json.dumps(OFF | {"Spillway.Store.Address": address} | told))

    def run(self, prompt):
        """(picture, latents) of a prompt, and the classes of the nodes that ran."""
        history = self.server.run(prompt)
        assert history["status"]["status_str"] == "success", json.dumps(history["status"])[-3000:] + self.server.said()
        ran = {one["kind"] for one in self.report()["run"]["nodes"]}
        image = self.server.pictures_of(history)["picture"]
        (latents,) = history["outputs"]["latents"]["latents"]
        return image, safetensors.torch.load_file(self.base / "output" / latents["filename"])["latent_tensor"], ran

    def report(self):
        return self.server.get("spillway/memory")

    def wait_until_written(self):
        return self.server.wait(lambda: self.report()["store"]["writing_bytes"] == 0 and self.report()["store"], 60)

    def peak(self):
        """The most memory that the server has had, in bytes."""
        with open(f"/proc/{self.server.process.pid}/status") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

    def encoders(self):
        return [model["name"] for model in self.report()["models"] if "clip" in model["name"].lower()]


@pytest.fixture(scope="module")
def files(checkpoint):
    return {
        "diffusion_models/flux": checkpoint("flux", **FLUX),
        "text_encoders/clip": checkpoint("clip_l"),
        "vae/flux": checkpoint("flux_vae"),
    }


@pytest.fixture(scope="module")
def machines(tmp_path_factory, files):
    base = tmp_path_factory.mktemp("machines")
    (base / "store").mkdir()
    first, second = (Machine(base / name, files) for name in ("here", "there"))
    with first.server, second.server:
        yield first, second, base / "store"


def shared_by(first, second, address):
    """The second machine makes nothing again that the first has made, and never loads the text encoder."""
    for one in (first, second):
        one.use(address)
    made = first.run(graph("a red house by the sea"))
    assert {"CLIPTextEncode", "KSampler", "VAEDecode"} <= made[2] and first.encoders()
    assert first.wait_until_written()["written"] >= 4
    found = second.run(graph("a red house by the sea"))
    assert np.array_equal(made[0], found[0]) and torch.equal(made[1], found[1])
    assert found[2] <= {"SaveImage", "SaveLatent"}
    other = second.run(graph("a red house by the sea", seed=4))
    assert "KSampler" in other[2] and not other[2] & {"CLIPLoader", "CLIPTextEncode"}
    assert second.encoders() == [], "its text was there"
    second.wait_until_written()
    assert torch.equal(first.run(graph("a red house by the sea", seed=4))[1], other[1])
    assert not first.report()["store"]["state"] and not second.report()["store"]["state"]
    if os.path.exists("/proc/self/status"):
        encoder = os.path.getsize(first.base / "models" / "text_encoders" / "clip.safetensors")
        assert first.peak() - second.peak() > encoder / 2, "it never held the text encoder"
    return second.report()["store"]


def test_a_folder_is_shared(machines):
    first, second, store = machines
    told = shared_by(first, second, f"file://{store}")
    assert told["found"] >= 4 and told["refused"] == 0
    assert sorted(path.name for path in store.iterdir()) == ["spillway-outputs"]


@pytest.mark.slow
def test_a_file_that_differs_and_a_store_that_goes(machines, files):
    """Another text encoder of the same name is another one. A folder that vanishes costs no prompt anything."""
    first, second, store = machines
    first.use(f"file://{store}")
    second.use(f"file://{store}")
    text = "a green boat"
    made = first.run(graph(text))
    first.wait_until_written()
    path = second.base / "models" / "text_encoders" / "clip.safetensors"
    weights = safetensors.torch.load_file(path)
    name = next(name for name in weights if name.endswith("token_embedding.weight"))
    path.unlink()
    safetensors.torch.save_file({**weights, name: weights[name] * 1.5}, path)
    other = second.run(graph(text))
    assert {"CLIPTextEncode", "KSampler"} <= other[2] and not torch.equal(made[1], other[1])
    path.unlink()
    os.link(files["text_encoders/clip"], path)
    second.server.ask("spillway/free", json.dumps({"cache": True}).encode(), "POST")
    assert torch.equal(second.run(graph(text))[1], made[1])
    store.rename(store.with_name("gone"))
    begun = time.monotonic()
    assert {"CLIPTextEncode"} <= second.run(graph("a blue boat"))[2] and time.monotonic() - begun < 30
    store.with_name("gone").rename(store)


def test_a_bucket_of_s3_is_shared(tmp_path, files):
    with S3Server(tmp_path / "s3.log") as s3:
        first, second = (Machine(tmp_path / name, copy.copy(files), **s3.variables) for name in ("here", "there"))
        with first.server, second.server:
            shared_by(first, second, f"s3://{BUCKET}/some/prefix")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sftp", "smb"])
def test_a_server_of_files_is_shared(kind, tmp_path, files):
    with StoreServer(kind, tmp_path / "store") as there:
        first, second = (Machine(tmp_path / name, copy.copy(files), **there.variables) for name in ("here", "there"))
        with first.server, second.server:
            shared_by(first, second, there.address)
