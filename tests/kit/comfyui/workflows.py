"""The pack's example workflows, as the prompts that the frontend makes of them."""

import json

from kit.pack import ROOT

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
NOTES = ("Note", "MarkdownNote")


def example(name):
    """An example workflow's JSON."""
    return json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))


def as_prompt(workflow, known):
    """Return the prompt of a workflow, with its values as they are. known: the server's `object_info`."""
    links = {link: [str(source), slot] for link, source, slot, *_ in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        described, values, inputs = known[node["type"]], list(node.get("widgets_values") or []), {}
        for part in ("required", "optional"):
            for name in described["input_order"].get(part, ()):
                kind, extra = (*described["input"][part][name], {})[:2]
                if (isinstance(kind, list) or kind in WIDGETS) and not extra.get("forceInput"):
                    inputs[name] = values.pop(0)
                    if extra.get("control_after_generate"):
                        values.pop(0)
        inputs |= {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
