"""Foresees what the workflow that it is part of will take."""

from __future__ import annotations

import json
from typing import Any

from comfy_api.latest import io

from .checked_node import CheckedNode
from .forecast_report import forecast
from .forecast_words import in_lines
from .inputs import CATEGORY


class SpillwayMemoryForecast(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayMemoryForecast",
            display_name="Memory Forecast (Spillway)",
            category=CATEGORY,
            description="Says what each sampler of this workflow will take, before it runs: what stays on the device, "
            "what each step brings, the peak, and what to set where it is too much. Reads the headers of files alone.",
            search_aliases=["will it fit", "vram estimate", "out of memory", "memory estimate", "predict vram", "oom"],
            is_output_node=True,
            inputs=[
                io.AnyType.Input(
                    "value",
                    optional=True,
                    tooltip="Anything, such as a latent on its way to a sampler. It is passed on once the forecast is "
                    "made.",
                ),
            ],
            hidden=[io.Hidden.prompt],
            outputs=[
                io.AnyType.Output("value_out", display_name="value", tooltip="What came in. Empty if nothing did."),
                io.String.Output("forecast", display_name="forecast", tooltip="The forecast as text."),
                io.String.Output("json", display_name="json", tooltip="The same as data, in JSON."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return float("nan")  # it depends on the whole workflow, and on what is free

    @classmethod
    def execute(cls, value: Any = None) -> io.NodeOutput:
        told = forecast(cls.hidden.prompt or {})
        text = in_lines(told)
        return io.NodeOutput(value, text, json.dumps(told), ui={"text": [text]})
