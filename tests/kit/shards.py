"""Writes models in several files, as people publish large ones."""

import json

import torch
from safetensors.torch import save_file


def write_shards(folder, tensors, count=3, stem="model", pickled=False, **changes):
    """Write the parts and their index into a folder. Returns the index. changes: key -> file, as the index has it."""
    kind = "bin" if pickled else "safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    keys, where = sorted(tensors), {}
    for number in range(count):
        name = f"{stem}-{number + 1:05}-of-{count:05}.{kind}"
        part = {key: tensors[key].contiguous() for key in keys[number::count]}
        if pickled:
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, metadata={"format": "pt", f"part{number}": "x"})
        where |= dict.fromkeys(part, name)
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": {**where, **changes}}))
    return index
