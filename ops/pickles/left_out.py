"""What training programs write beside the weights: classes that are known to be no weights, and are not needed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch

# Callbacks, arguments, paths, and single numbers of numpy. Arrays are not here, as they may be weights.
BESIDE_WEIGHTS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
    "argparse.Namespace",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)
_one_at_a_time = threading.Lock()


class _Nothing:
    """Stands for an object that is left out. Takes whatever it is given, and keeps and does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _named(name: str) -> type[_Nothing]:
    module, _, short = name.rpartition(".")
    return type(short, (_Nothing,), {"__module__": module, "__qualname__": short})


_stand_ins = [_named(name) for name in BESIDE_WEIGHTS]
# Another pack may have allowed numpy's own dtype, whose objects have these classes. They hold nothing but a kind.
if hasattr(numpy, "dtypes"):  # not before numpy 1.25
    _stand_ins += [kind for kind in vars(numpy.dtypes).values() if isinstance(kind, type)]


@contextmanager
def left_out() -> Iterator[None]:
    """Let torch's weights-only reader put an empty object for each of BESIDE_WEIGHTS.

    None of the classes themselves is imported or called. Only for as long as a file needs it: the names are torch's own
    list, which other packs read with too.
    """
    with _one_at_a_time:
        there = torch.serialization.get_safe_globals()  # what others have allowed stays so
        with torch.serialization.safe_globals([one for one in _stand_ins if one not in there]):
            yield
