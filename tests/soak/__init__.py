"""A soak of the pack in real ComfyUI servers, from outside over HTTP: a random mix of prompts with disturbances.

files.py        the model files, and who replaces them
write_files.py  writes them, in a process of its own
mix.py          random graphs
servers.py      two servers on one folder, and a fresh one that nothing disturbs
jobs.py         a prompt that was sent, and what came of it
compare.py      what a prompt made, as digests, and what a fresh server makes of it
disturb.py      the disturbances
fuzz.py         prompts and requests with inputs that make no sense
wrong_inputs.py many of them on one server
kills.py        servers killed while they save, write and sample
invariants.py   what must hold whatever happens
soak.py         one round of the mix
test_soak.py    runs them; `python dev.py soak` and tests/kit/soak_runs.py say for how long
"""
