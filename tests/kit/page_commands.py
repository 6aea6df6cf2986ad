"""The commands and graphs that the pages for users name, and what runs each. Imports the standard library alone.

`tests/dev/test_page_commands.py` runs those of `RUN` as they stand, but for what makes them small. `ELSEWHERE` names
the test, or the line of `.ci/run`, that runs another. What cannot run is in `NOT_HERE`, with the reason.
`tests/rules/test_page_commands.py` finds a command that is in none of them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# What begins a line or a piece of code that is a command: a program, or variables in front of one.
PROGRAM = re.compile(
    r"(?:[A-Z_]+=(?:\"[^\"]*\"|\S+) )*"
    r"(?:python3?|dev\.py|pip3?|uvx?|git|curl|wget|docker|podman|wsl|comfy|comfy-test|apt|apt-get|brew|npm|sudo) \S"
)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?: {4}\S.*(?:\n|\Z))+")
CODE = re.compile(r"`([^`]+)`")
ROUTE = re.compile(r"(?:GET|POST|PUT|DELETE) /\S+")
JSON = re.compile(r"[{\"].*:", re.DOTALL)
FLAG = re.compile(r"--[a-z][a-z-]+")
VARIABLE = re.compile(r"\bSPILLWAY_[A-Z_]+")
COMFYUIS = re.compile(r"ComfyUI's(?: own)? \*([A-Z][^*]+)\*")
WORKFLOW = re.compile(r"\*\*([a-z0-9]+(?:_[a-z0-9]+)+)\*\*")
SHELLS = {"", "bash", "sh", "shell", "console", "bat", "powershell", "text"}


class Run(NamedTuple):
    """says: what it prints. adds: what makes it small. code: how it ends; None: either way. slow: with `--slow` alone.

    comfyui: it needs one.
    """

    says: str
    adds: str = ""
    code: int | None = 0
    slow: bool = False
    comfyui: bool = False


IN_COMFYUI = Run("", comfyui=True)
RUN = {
    "git clone https://github.com/spillway-comfy/ComfyUI-Spillway custom_nodes/ComfyUI-Spillway": Run("Cloning into"),
    "python -m pip install -r custom_nodes/ComfyUI-Spillway/requirements.txt": Run(
        "already satisfied", "--dry-run --no-index"
    ),
    "python dev.py bench": Run("card_table"),
    "python dev.py bench card_table": Run("| Qwen-Image | 40.9 |"),
    "python dev.py bench card_table --bits 8": Run("| Qwen-Image | 20.4 |"),
    "python dev.py bench compile_step": IN_COMFYUI._replace(
        says="graphs in the script", adds="--hidden 128 --size 64 --steps 1 --limit 1", slow=True
    ),
    "python dev.py bench formats": IN_COMFYUI._replace(says="| nvfp4", adds="--hidden 128 --steps 1", slow=True),
    "python dev.py bench gguf --pack FOLDER": IN_COMFYUI._replace(
        says="Spillway 0 %", adds="--hidden 256 --size 64 --load-depth 1 --loads 1 --rounds 1", slow=True
    ),
    "python dev.py bench gguf --pack FOLDER --hidden 3072": IN_COMFYUI._replace(
        says="Spillway 0 %", adds="--hidden 256 --size 64 --load-depth 1 --loads 1 --rounds 1", slow=True
    ),
    "python dev.py bench int8_in_comfyui": IN_COMFYUI._replace(
        says="INT8 0 %", adds="--hidden 256 --size 64 --rounds 1", slow=True
    ),
    "python dev.py bench save_model": IN_COMFYUI._replace(
        says="speed to a copy's", adds="--hidden 256 --depth 1 --rounds 1", slow=True
    ),
    "python dev.py bench server_load": IN_COMFYUI._replace(
        says="reports were sent", adds="--only polled --rounds 1 --steps 1", slow=True
    ),
    "python dev.py convert FILE": Run("model.safetensors"),
    "python dev.py convert FILE... --to FOLDER": Run("other.safetensors"),
    "python dev.py demo": Run("largest difference", "--gb 0.1 --steps 1 --size 64 --device cpu"),
    "python dev.py demo --comfyui ~/ComfyUI": IN_COMFYUI._replace(
        says="", adds="--gb 0.1 --steps 1 --size 64", slow=True
    ),
    "python dev.py gpu": Run("there is no GPU to test", code=2),
    "python dev.py probe FILE": Run("4 tensors"),
    "python dev.py release": Run("pages: links, lengths, dates of figures: all right", "--untested", code=None),
    "python dev.py sim": Run("largest difference from the plain model: 0", "--gb 0.1 --steps 1 --size 64"),
}


class Elsewhere(NamedTuple):
    """where: a test, or a line of `.ci/run`. why: what runs there, or what differs."""

    where: str
    why: str


ON_A_SERVER = "tests/comfyui/server/test_example_workflows.py"
ROUTES = f"{ON_A_SERVER}::test_a_route_answers_as_its_page_says"
WITH_CURL = f"{ON_A_SERVER}::test_curl_asks_as_the_page_says"
CACHE_FLAGS = "tests/comfyui/cache/test_install.py::test_the_default_is_ours_and_flags_are_respected"
FLAGS_ON_A_CARD = "tests/comfyui/device/test_options.py::test_latents_are_comfyuis_under"
BY_CI = ".ci/run: python3 dev.py"

ELSEWHERE = {
    "python dev.py lint": Elsewhere(f"{BY_CI} lint", "before any test"),
    "python dev.py test": Elsewhere(f"{BY_CI} test", "it runs all tests, this one too"),
    "python dev.py test --only browser": Elsewhere(
        "tests/comfyui/browser/test_panel.py::test_it_shows_a_run_with_the_numbers_of_the_route",
        "a plain `dev.py test` runs the browser's tests too, where there is a browser",
    ),
    'SPILLWAY_TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" python dev.py test': Elsewhere(
        f"{BY_CI} test", "the variable names what the first call installs; the lanes of GitHub set it to each torch"
    ),
    "python dev.py gpu --only check": Elsewhere(f"{BY_CI} gpu --fake", "the check is its first part, on the fake card"),
    "python dev.py gpu --short": Elsewhere(f"{BY_CI} gpu --fake", "--fake is the short form, on the fake card"),
    "curl http://127.0.0.1:8188/spillway/memory": Elsewhere(WITH_CURL, "with the server's port"),
    'curl -H "Content-Type: application/json" -d \'{"models": true}\' http://127.0.0.1:8188/spillway/free': Elsewhere(
        WITH_CURL, "with the server's port"
    ),
    '"spillway_manage": true': Elsewhere(
        "tests/comfyui/server/test_server.py::test_comfyuis_loaders_give_the_same_pictures_with_every_loader_managed",
        "a real server is asked so for true and for false",
    ),
    "GET /spillway/compare": Elsewhere(ROUTES, ""),
    "GET /spillway/memory": Elsewhere(ROUTES, ""),
    "POST /spillway/compare": Elsewhere(ROUTES, ""),
    "POST /spillway/forecast": Elsewhere(ROUTES, ""),
    "POST /spillway/free": Elsewhere(ROUTES, ""),
    "POST /spillway/model": Elsewhere(ROUTES, ""),
    '{"cache": true, "models": true, "pins": true}': Elsewhere(ROUTES, ""),
    '{"model": 3, "action": "limit", "value": 4294967296}': Elsewhere(ROUTES, "with the number of a model there"),
    '{"prompt": ...}': Elsewhere(ROUTES, "with a prompt in place of the dots"),
    # Flags of ComfyUI. tests/comfyui/nodes/test_docs.py asks ComfyUI whether it has each.
    "--cache-classic": Elsewhere(CACHE_FLAGS, ""),
    "--cache-lru": Elsewhere(CACHE_FLAGS, ""),
    "--cache-none": Elsewhere(CACHE_FLAGS, ""),
    "--cache-ram": Elsewhere("tests/comfyui/cache/test_install.py::test_headroom_is_the_flags_else_a_tenth", ""),
    "--disable-dynamic-vram": Elsewhere(FLAGS_ON_A_CARD, "on the fake card"),
    "--disable-metadata": Elsewhere(
        "tests/comfyui/saving/test_nodes.py::test_the_workflow_is_in_the_metadata_unless_that_is_turned_off", ""
    ),
    "--disable-pinned-memory": Elsewhere(FLAGS_ON_A_CARD, "on the fake card"),
    "--gpu-only": Elsewhere(FLAGS_ON_A_CARD, "on the fake card"),
    "--listen": Elsewhere(
        "tests/comfyui/loading/test_remote.py::test_a_file_of_this_machine_is_brought_to_those_who_may", ""
    ),
}

NOT_HERE = {
    "python dev.py bench card": "fills a real card with torch.cuda. Its contestants are those of `comfyui_loader`, "
    "which `dev.py gpu --fake` runs in CI. Without a card it says so, which tests/dev/test_page_commands.py asks",
    "wsl --shutdown": "restarts Windows' Linux, of Windows",
}

# The pack's variables -> the test in which one is set.
VARIABLES = {
    "SPILLWAY_ALLOCATOR": "tests/ram/test_available.py::test_prestartup_leaves_the_users_choice",
    "SPILLWAY_CACHE": "tests/comfyui/cache/test_install.py::test_the_variable_and_the_setting_turn_it_off",
    "SPILLWAY_CACHE_GB": "tests/comfyui/cache/test_cap.py::test_no_more_than_the_cap_is_held",
    "SPILLWAY_MANAGE": "tests/comfyui/nodes/test_manage.py::test_the_variable_goes_before_the_setting",
    "SPILLWAY_MODELS_GB": "tests/comfyui/nodes/test_rules.py::test_the_executor_begins_each_prompt_with_what_it_says",
    "SPILLWAY_RAM_GB": "tests/patcher/test_ram_limits.py::test_the_variable_limits_a_cpu",
    "SPILLWAY_REMOTE": "tests/comfyui/loading/test_remote.py::test_a_file_of_this_machine_is_brought_to_those_who_may",
    "SPILLWAY_STORE": "tests/comfyui/cache/test_shared_store.py"
    "::test_the_variable_goes_before_the_setting_and_a_bad_key_turns_it_off",
    "SPILLWAY_STORE_KEY": "tests/comfyui/cache/test_shared_store.py"
    "::test_members_of_one_key_find_each_other_and_no_others",
    "SPILLWAY_TORCH": f"{BY_CI} test",
}

# What pages say of ComfyUI's own nodes, which no example workflow has -> the test of it.
NODES_OF_COMFYUI = {
    "Load LoRA": "tests/comfyui/cache/test_kept_files.py"
    "::test_what_a_node_made_of_a_file_that_it_had_kept_is_found_by_nobody",
    "MultiGPU CFG Split": "tests/comfyui/device/test_second_device.py::test_cfg_split_over_two_devices",
    "Select Model Device": "tests/comfyui/device/test_second_device.py::test_select_model_device",
}


def as_one(command: str) -> str:
    """Return a command in one spelling, without its comment."""
    words = " ".join(re.sub(r"\s+# .*", "", command).split())
    return re.sub(r"(?<![\w.])(?:python3? )?dev\.py", "python dev.py", words.removeprefix("$ ")).replace(
        "python3 ", "python "
    )


def commands_of(text: str) -> set[str]:
    """Find the commands, flags, routes and pieces of JSON of a page: what somebody could type or send."""
    found = set()
    for language, lines in FENCED.findall(text):
        found |= {as_one(line) for line in lines.splitlines() if line.strip()} if language in SHELLS else {lines}
    text = FENCED.sub("", text)
    for block in INDENTED.findall(text):
        found |= {as_one(line) for line in block.splitlines()}
    for code in CODE.findall(INDENTED.sub("", text)):
        if PROGRAM.match(code) or any(pattern.fullmatch(code) for pattern in (ROUTE, FLAG)) or JSON.match(code):
            found.add(as_one(code))
    return found
