"""What tests share: small models, simulated devices, and a ComfyUI to run in.

`tests` is on sys.path (pytest's option `pythonpath`), so a test writes `from kit.nets import Stack`. Test files import
from here, and from no other test file.

environment, find_comfyui    need the standard library alone, because dev.py imports them
processes, comfyui/processes scripts that tests run in a process of its own
comfyui                      imports ComfyUI
"""
