"""Serves workflows that know a node by an older id, where that id does not belong to another pack."""

from __future__ import annotations

import logging
import reprlib
import sys
from typing import Any

import nodes as comfyui_nodes
from comfy_api.latest import ComfyAPI, io

from .compile import DYNAMIC, SpillwayLazyTorchCompile

log = logging.getLogger("spillway")

OLD_COMPILE = "INT8LazyTorchCompile"


class INT8LazyTorchCompile(SpillwayLazyTorchCompile):
    """The node under an id that another pack has too. It takes the names of both forms of that node's inputs."""

    of_spillway = True

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = SpillwayLazyTorchCompile.define_schema()
        schema.node_id, schema.is_deprecated = OLD_COMPILE, True
        schema.display_name = f"{schema.display_name}, old id"
        for entry in schema.inputs[1:]:
            entry.optional = True
        # Last: workflow files keep values by position.
        schema.inputs += [
            io.Combo.Input(
                "dynamic_shape_tracing",
                options=list(DYNAMIC),
                optional=True,
                tooltip="Another name of dynamic.",
            ),
            io.Boolean.Input("verbose", optional=True, tooltip="Another name of log_compile."),
        ]
        return schema

    @classmethod
    def validate_inputs(cls, dynamic: Any = None, dynamic_shape_tracing: Any = None) -> bool:
        """Take what the other node takes, which may be a switch."""
        return True

    @classmethod
    def execute(cls, model: Any, **values: Any) -> io.NodeOutput:
        defaults = {entry.id: entry.default for entry in SpillwayLazyTorchCompile.define_schema().inputs[1:]}
        for name, other in (("dynamic", "dynamic_shape_tracing"), ("log_compile", "verbose")):
            value = values.pop(other, None)
            if value is not None:
                values[name] = value
                if name == "dynamic" and str(value).lower() not in DYNAMIC:
                    raise ValueError(
                        f"{cls.define_schema().display_name}: the input '{other}' is {reprlib.repr(value)}; expected "
                        f"one of {', '.join(DYNAMIC)}."
                    )
        values["dynamic"] = str(values.get("dynamic", defaults["dynamic"])).lower()
        return SpillwayLazyTorchCompile.execute(model=model, **{**defaults, **values})


def free_old_ids() -> list[type[io.ComfyNode]]:
    """Return the nodes to register under older ids: those that no pack has taken that was loaded before.

    A pack that is loaded later takes its id over, as ComfyUI keeps the last.
    """
    taken = comfyui_nodes.NODE_CLASS_MAPPINGS.get(OLD_COMPILE)
    if taken is None or getattr(taken, "of_spillway", False):
        return [INT8LazyTorchCompile]
    log.info(
        "[Spillway] the node id %s belongs to another pack (%s), and stays its own. Spillway's node is %s.",
        OLD_COMPILE,
        getattr(taken, "RELATIVE_PYTHON_MODULE", taken.__module__),
        SpillwayLazyTorchCompile.define_schema().node_id,
    )
    return []


async def tell_of_replacements() -> None:
    """Tell ComfyUI which node took the place of an older id, where ComfyUI keeps a list of that and there is a server.

    Server and page go by the list only where nobody has the id, so a graph changes neither here nor beside the other
    pack. It could not stand in place of the class: the server stops at a prompt that lacks an input of the mapping, as
    one of either form does.
    """
    running = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    replacement = getattr(io, "NodeReplace", None)
    if replacement is None or not hasattr(running, "node_replace_manager"):
        return
    new = SpillwayLazyTorchCompile.define_schema()
    names = [entry.id for entry in new.inputs]
    await ComfyAPI().node_replacement.register(
        replacement(
            new_node_id=new.node_id,
            old_node_id=OLD_COMPILE,
            old_widget_ids=names[1:],  # all but the model, in the order in which workflow files keep their values
            input_mapping=[{"new_id": name, "old_id": name} for name in names],
            output_mapping=[{"new_idx": 0, "old_idx": 0}],
        )
    )
