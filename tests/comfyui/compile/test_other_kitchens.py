"""The pack loads with a comfy-kitchen that is older than ComfyUI wants, as ComfyUI does."""

from kit.comfyui.fresh_process import run_script


def test_the_pack_loads_with_an_older_comfy_kitchen():
    assert run_script("older_kitchen.py")["nodes"] > 30
