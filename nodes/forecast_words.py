"""Words a forecast for people."""

from __future__ import annotations

from typing import Any

from ..ops.ledger import in_words


def in_lines(report: dict[str, Any]) -> str:
    """Word a forecast for people."""
    lines = [] if report["samplers"] else ["There is no sampler in this workflow."]
    for one in [*report["samplers"], *report["uses"]]:
        lines.append(f"{one['kind']} ({one['id']}): {_in_a_line(one['forecast'], one.get('what'))}")
        lines += [f"  {_note(note)}" for note in one["notes"]]
        for way in one["ways"]:
            lines += [f"  {_way(way)}:", f"    {_in_a_line(way['forecast'], one.get('what'))}"]
    if report["left_out"]:
        lines.append(f"{report['left_out']} more nodes are not looked at.")
    return "\n".join(lines)


def _way(way: dict[str, Any]) -> str:
    where = f"{way['kind']} ({way['id']})"
    if "swap" in way:
        return f"{way['swap']} with {', '.join(f'{k} {v}' for k, v in way['values'].items())} in the place of {where}"
    return f"{way['widget']} of {where} to {way['value']}"


def _in_a_line(told: dict[str, Any] | None, what: str | None) -> str:
    """Word what is foreseen. what: is done with it; None for a sampling, which has steps."""
    if told is None:
        return "nothing is foreseen."
    stays = f"{in_words(told['resident'])} of {in_words(told['total'])} stay on {told['device']}"
    use = "use" if what else "step"
    streams = f"each {use} brings {in_words(told['streamed'])}" if told["streamed"] else "nothing is brought"
    least = "" if not told["at_least"] else f", at least {told['at_least']:.2f} s a step"
    if told["seconds"] and not what:
        waits = f", of which it waits {told['waits']:.2f} s" if told["waits"] else ""
        least = f", about {told['seconds']:.2f} s a step{waits}"
    how = "as seen in an earlier run" if told["learnt"] else "by ComfyUI's estimate"
    tiles = ", in tiles" if told.get("tiled") else ""
    peak = f"the peak is {in_words(told['peak'])} of {in_words(told['device_total'])} ({how}{tiles})"
    peak += "" if told["fits"] else ", which does not fit"
    return f"{told['name']}, {told['format']}: {stays}, {streams}{least}; {peak}."


NOTES = {
    "unknown": "what {kind} ({node}) gives is not known: no loader was found behind it.",
    "passed": "{kind} ({node}) is taken for a node that makes the model no larger.",
    "theirs": "{kind} ({node}) is ComfyUI's own: so it would be with a Spillway loader in its place.",
    "wired": "{widget} of {kind} comes by wire, and is known when the workflow runs.",
    "missing": "node {node} is not in the workflow.",
    "circle": "the workflow goes round in a circle.",
    "policy": "the policy of {kind} ({node}) is known when the workflow runs.",
    "size": "the size of the latent is not known: 1024 x 1024 is assumed.",
    "int8_auto": "int8 is taken for faster here. The loader measures that.",
    "int8_lora": "LoRAs are taken to be merged. The run looks at their numbers.",
    "text": "what a prompt takes beside the weights is not counted, until one has run here.",
    "error": "{words}",
}


def _note(note: dict[str, str]) -> str:
    return NOTES[note["code"]].format(**note)
