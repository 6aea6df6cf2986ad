"""Models in several files: the tensors of the whole, lazily, and an error with a reason for an index that is wrong."""

import copy
import json
import os
import random
import sys

import pytest
import torch
from safetensors.torch import save_file

from kit.nets import same
from kit.shards import write_shards
from spillway.ops.files.disk_map import SourceError, locate
from spillway.ops.files.watched_file import FileChanged
from spillway.ops.parts.folder import MODEL, TEXT, VAE, files_for, is_pipeline
from spillway.ops.parts.open_map import open_map
from spillway.ops.parts.probe import probe
from spillway.ops.pickles.convert import _opened, convert


def tensors(count=7):
    torch.manual_seed(1)
    made = {f"layer.{index}.weight": torch.randn(4, 3 + index).to(torch.bfloat16) for index in range(count)}
    return {**made, "norm": torch.randn(5), "empty": torch.zeros(0, 2)}


def test_all_tensors_of_the_whole_as_views_of_the_parts(tmp_path):
    index = write_shards(tmp_path, tensors())
    source = open_map(index)
    assert set(source.keys()) == set(tensors()) and len(source.files) == 3
    assert all(same(value, tensors()[key]) for key, value in source.state_dict().items())
    assert all(locate(value) is not None for key, value in source.state_dict().items() if value.numel())
    assert source.metadata["part2"] == "x" and source.spec("norm").shape == (5,) and "norm" in source
    with pytest.raises(SourceError, match=r"model\.safetensors\.index\.json: no tensor 'none'"):
        source.tensor("none")
    source.check()
    with open(source.files[1].path, "ab") as file:
        file.write(b"x")
    with pytest.raises(FileChanged, match="model-00002-of-00003"):
        source.check()


WRONG = {
    "a missing part": (
        {"norm": "model-00009-of-00003.safetensors"},
        "part 4 of 4, 'model-00009.*', is missing.*'norm'",
    ),
    "a key in no part": ({"more": "model-00001-of-00003.safetensors"}, "'more' is not in 'model-00001"),
    "a key in another part": ({"norm": "model-00001-of-00003.safetensors"}, "'norm' is not in 'model-00001"),
    "out of the folder": (
        {"norm": "../model-00001-of-00003.safetensors"},
        r"'norm' is in '\.\./model.*It is not opened",
    ),
    "deep out of it": ({"norm": "a/../../b.safetensors"}, "It is not opened"),
    "absolute": ({"norm": "/etc/passwd"}, "'norm' is in '/etc/passwd'.*It is not opened"),
    "of Windows": ({"norm": "C:\\models\\a.safetensors"}, "It is not opened"),
    "a share": ({"norm": "\\\\server\\a.safetensors"}, "It is not opened"),
    "no name": ({"norm": ""}, "It is not opened"),
    "a zero": ({"norm": "a\0b"}, "It is not opened"),
    "a number": ({"norm": 3}, "'norm' is in 3; expected the name of a file"),
    "a pickle": ({"norm": "model.bin"}, "'model.bin', is missing"),
    "a folder": ({"norm": "."}, "It is not opened"),
    "a name that is too long": ({"norm": "x" * 5000 + ".safetensors"}, "'norm' is in 'xxx.*It is not opened"),
}


def as_pickles(value):
    return value.replace("safetensors", "bin") if isinstance(value, str) else value


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_index_is_refused_by_name(name, pickled, tmp_path):
    changes, words = WRONG[name]
    if pickled:
        changes, words = {key: as_pickles(value) for key, value in changes.items()}, as_pickles(words)
    index = write_shards(tmp_path / "models", tensors(), pickled=pickled, **changes)
    before = os.listdir(index.parent)
    with pytest.raises(SourceError, match=words) as error:
        (convert if pickled else open_map)(index)
    assert str(index) in str(error.value) and os.listdir(index.parent) == before
    with pytest.raises(SourceError):
        probe(index)


def test_damaged_parts_and_indexes_are_refused_by_name(tmp_path):
    index = write_shards(tmp_path, tensors())
    text = index.read_text()
    index.write_bytes(text.encode("utf-16"))
    with pytest.raises(SourceError, match="not JSON"):
        open_map(index)
    index.write_bytes(text.encode("utf-8-sig"))  # as editors on Windows save it
    assert len(open_map(index)) == len(tensors())
    pickled = write_shards(tmp_path, tensors(), pickled=True)
    for wrong, words in {
        "": "not JSON",
        "[]": "no weight_map",
        '{"weight_map": {}}': "no weight_map",
        '{"weight_map": 3}': "no weight_map",
        '{"weight_map": {"a": "x", "a": "y"}}': "has 'a' twice",
        text.replace('"weight_map"', '"weight_map": {}, "weight_map"'): "has 'weight_map' twice",
        "[" * 100_000: "not JSON",
    }.items():
        for path, use in ((index, open_map), (pickled, convert)):
            path.write_text(wrong)
            with pytest.raises(SourceError, match=words) as error:
                use(path)
            assert str(path) in str(error.value)
    index.write_text(text)
    second = tmp_path / "model-00002-of-00003.safetensors"
    data = second.read_bytes()
    second.write_bytes(data[:-3])
    with pytest.raises(SourceError, match=r"model-00002-of-00003\.safetensors: truncated"):
        open_map(index)
    save_file({**tensors(), "x": torch.zeros(1)}, second)
    with pytest.raises(SourceError, match=r"is in 'model-00002.*' and in 'model-00001.*'; expected each tensor in one"):
        open_map(index)


def test_a_part_alone_says_which_and_what_to_choose(tmp_path):
    index = write_shards(tmp_path, tensors())
    part = tmp_path / "model-00002-of-00003.safetensors"
    words = r"this is part 2 of 3 of 'model'.*Choose 'model\.safetensors\.index\.json' beside it"
    with pytest.raises(SourceError, match=words):
        open_map(part)
    assert "Choose 'model.safetensors.index.json'" in probe(part).words and "in 3 files" in probe(index).words
    index.unlink()
    with pytest.raises(SourceError, match=r"Put the other parts and the model's index"):
        open_map(part)
    variant = write_shards(tmp_path, tensors(), stem="model.fp16").rename(
        tmp_path / "model.safetensors.index.fp16.json"
    )
    with pytest.raises(SourceError, match=r"Choose 'model\.safetensors\.index\.fp16\.json'"):
        open_map(tmp_path / "model.fp16-00001-of-00003.safetensors")
    assert set(open_map(variant).keys()) == set(tensors())


def test_which_files_of_a_folder_a_loader_opens(tmp_path):
    def touch(name):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return path

    touch("p/model_index.json")
    plain, half = (
        touch("p/unet/diffusion_pytorch_model.safetensors"),
        touch("p/unet/diffusion_pytorch_model.fp16.safetensors"),
    )
    touch("p/unet/diffusion_pytorch_model.non_ema.safetensors")
    vae = touch("p/vae/diffusion_pytorch_model.safetensors.index.json")
    touch("p/vae/diffusion_pytorch_model-00001-of-00002.safetensors")
    one, two = touch("p/text_encoder/model.safetensors"), touch("p/text_encoder_2/model.safetensors.index.fp16.json")
    pipeline = tmp_path / "p"
    assert is_pipeline(pipeline) and not is_pipeline(pipeline / "unet")
    assert files_for(pipeline, MODEL) == files_for(pipeline / "unet", MODEL) == [half]
    half.unlink()
    assert files_for(pipeline / "model_index.json", MODEL) == [plain]
    assert files_for(pipeline, VAE) == [vae] and files_for(pipeline, TEXT) == [one, two]
    assert files_for(plain, VAE) == [plain]
    for names, words in ((("x",), "no weights, and no x folder"), (("empty",), "no safetensors file here")):
        (pipeline / "empty").mkdir(exist_ok=True)
        with pytest.raises(SourceError, match=words):
            files_for(pipeline, names)
    touch("p/empty/pytorch_model.bin")
    with pytest.raises(SourceError, match=r"only pickles here, such as 'pytorch_model\.bin'.*Convert"):
        files_for(pipeline, ("empty",))
    touch("q/a.safetensors")
    assert files_for(tmp_path / "q", VAE) == [tmp_path / "q" / "a.safetensors"]
    touch("q/b.safetensors")
    with pytest.raises(SourceError, match=r"several models here: a\.safetensors, b\.safetensors"):
        files_for(tmp_path / "q", VAE)


# --- mutations --------------------------------------------------------------------------------------------------------

OTHERS = [
    None,
    0,
    -1,
    1.5,
    "",
    "x",
    "../x",
    "/etc/passwd",
    "model-00001-of-00003.safetensors",
    [],
    {},
    "a\0",
    "x" * 300,
    "x/" * 3000,
    "\ud800",
    ".",
]
opened = None


def note(event, arguments):
    if opened is not None and event in ("open", "os.system", "subprocess.Popen", "exec", "import"):
        opened.append((event, str(arguments[0])))


def mutated(found, rng, others):
    found = copy.deepcopy(found)
    for _ in range(rng.randint(1, 3)):
        box = rng.choice([found, found.get("weight_map")])
        if not isinstance(box, dict) or not box:
            continue
        key = rng.choice(list(box))
        kind = rng.randrange(4)
        if kind == 0:
            del box[key]
        elif kind == 1:
            box[key] = rng.choice(others)
        elif kind == 2:
            box[rng.choice(["new", "weight_map", "norm", ""])] = box[key]
        else:
            box[key] = rng.choice(list(box.values()))
    data = bytearray(json.dumps(found).encode())
    if rng.random() < 0.4:
        at = rng.randrange(len(data) + 1)
        data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    return bytes(data)


COUNTS = [
    (300, False),
    (100, True),
    pytest.param(10_000, False, marks=pytest.mark.fuzz),
    pytest.param(10_000, True, marks=pytest.mark.fuzz),
]


@pytest.mark.parametrize(("count", "pickled"), COUNTS)
def test_mutated_indexes(count, pickled, tmp_path):
    """An error that names the index or a part, or the right tensors; no file outside of the folder is opened."""
    global opened
    rng, index = random.Random(count), write_shards(tmp_path, tensors(), pickled=pickled)
    others = [as_pickles(value) for value in OTHERS] if pickled else OTHERS

    def read_all():
        return _opened(index)[0] if pickled else open_map(index).state_dict()

    original, wanted, read = json.loads(index.read_text()), tensors(), 0
    read_all()  # imports what it needs
    sys.addaudithook(note)
    before = set(os.listdir(tmp_path))
    for _ in range(count):
        index.write_bytes(mutated(original, rng, others))
        opened, words, found = [], None, None
        try:
            found = read_all()
        except SourceError as error:
            words = str(error)
        finally:
            seen, opened = opened, None
        assert all(kind == "open" and (str(tmp_path) in name or name.startswith("/proc/")) for kind, name in seen), seen
        if found is None:
            assert str(tmp_path) in words and len(words) < 3000
        else:
            read += 1
            assert all(same(value, wanted[key]) for key, value in found.items())
    assert count / 50 < read < count * 0.9
    assert set(os.listdir(tmp_path)) == before
