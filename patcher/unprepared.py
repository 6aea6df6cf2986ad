"""What stands in the caster's place until the first forward."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from ..ops.bundle import Bundle

if TYPE_CHECKING:
    from .dynamic import DynamicModel


class Unprepared:
    """Prepares the model when the first bundle is asked for; the caster that stands there then does the rest."""

    def __init__(self, model: DynamicModel) -> None:
        self._model = weakref.ref(model)

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of a dynamic module is a plain one."""

    def enter(self, bundle: Bundle) -> None:
        model = self._model()
        if model is None:
            raise RuntimeError(f"the dynamic model of '{bundle.name}' was dropped while its module is still in use.")
        model.prepare()
        assert model.caster is not None
        bundle.module.spillway_caster.enter(bundle)  # type: ignore[union-attr, operator]

    def exit(self, bundle: Bundle) -> None:
        bundle.module.spillway_caster.exit(bundle)  # type: ignore[union-attr, operator]

    def make_room(self, bundle: Bundle, error: BaseException, again: bool = True) -> bool:
        return bool(bundle.module.spillway_caster.make_room(bundle, error, again))  # type: ignore[union-attr, operator]
