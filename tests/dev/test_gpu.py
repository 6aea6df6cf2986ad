"""`dev.py gpu`: what it says without a GPU, what it counts, and its table."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from kit import gpu
from kit.environment import test_environment as environment_of_tests

TESTS = """
import os, pytest
def test_on_the_device(): assert os.environ["SPILLWAY_TEST_DEVICE"] == "cuda:0"
def test_that_fails(): assert {fine}
def test_skipped(): pytest.skip("x")
"""
RUN = {"share": 0.5, "same_bits": True, "vbar": "aimdo", "step_s": 0.002, "streamed_bytes": 3_000_000}
CHECK = {
    "identity": "A card (cuda:0), driver 1",
    "check": {"seconds": 0.4, "passed": ["copies"], "failed": {"INT8": "off by 1"}, "not_run": {"FP8": "none"}},
    "model": [RUN, {**RUN, "same_bits": False, "vbar": "software"}],
    "ok": False,
}


@pytest.fixture
def suites(tmp_path):
    """``suites(fine)``: two suites of three tests, of which one fails unless `fine`."""

    def make(fine):
        path = tmp_path / "test_small.py"
        path.write_text(TESTS.format(fine=fine))
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(path)]
        return gpu.Suites(lambda _: {"engine": gpu.Command("small tests", command, dict(os.environ))}, lambda _: {})

    return make


@pytest.fixture
def card(monkeypatch):
    """``card(found)``: what the process that looks for a device says, and the one that checks it."""

    def found(device, check=CHECK):
        answers = {"find_device.py": device, "print_self_report.py": check}
        monkeypatch.setattr(gpu, "ask", lambda process, environment: answers[process])

    return found


def test_without_a_gpu_it_says_so_and_exits_with_2(card, suites, capsys):
    card({"none": "torch 2.13.0+cpu is a build for the CPU alone"})
    assert gpu.main([], suites(True)) == 2
    said = capsys.readouterr().err
    assert "there is no GPU to test: torch 2.13.0+cpu" in said and "SPILLWAY_TORCH" in said and "--fake" in said


def test_a_driver_that_fails_is_no_gpu_to_test(card, suites, capsys):
    card({"failed": "find_device.py ended with code 1: CUDA driver version is insufficient"})
    assert gpu.main([], suites(True)) == 2
    assert "driver version is insufficient" in capsys.readouterr().err


def test_the_fake_device_must_be_there(monkeypatch, suites, tmp_path, capsys):
    monkeypatch.setattr(gpu, "FAKE_DEVICE", tmp_path / "fake_device")
    assert gpu.main(["--fake"], suites(True)) == 2
    assert "tests/fake_device" in capsys.readouterr().err


@pytest.mark.parametrize("fine", [True, False])
def test_suites_run_on_the_device_and_are_counted(card, suites, tmp_path, capsys, fine):
    card({"device": "cuda:0", "torch": "2.13.0", "fake": False})
    path = tmp_path / "folder" / "result.json"
    assert gpu.main(["--only", "engine", "--json", str(path)], suites(fine)) == (0 if fine else 1)
    result = json.loads(path.read_text())
    engine = result["engine"]
    assert (engine["passed"], engine["skipped"], len(engine["failures"])) == ((2, 1, 0) if fine else (1, 1, 1))
    assert engine["ok"] == result["ok"] == fine and result["device"] == "cuda:0" and result["date"]
    printed = capsys.readouterr().out
    assert f"| engine's tests | {2 if fine else 1} passed, 1 skipped" in printed
    assert ("test_that_fails" in printed.split("| engine's tests |")[1]) != fine


def test_dev_py_hands_over_what_runs(card, monkeypatch, tmp_path):
    card({"device": "cuda:0", "torch": "2.13.0", "fake": False})
    ran = []
    monkeypatch.setattr(gpu, "run_suite", lambda command, _: ran.append(command.command) or {"ok": True})
    spec = importlib.util.spec_from_file_location("dev", gpu.ROOT / "dev.py")
    dev = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dev)
    monkeypatch.setattr(gpu, "table", str)
    assert dev.gpu(["--only", "engine", "--short", "--json", str(tmp_path / "x.json")]) == 0
    (command,) = ran
    assert "tests/gpu" in command and dev.QUICK in " ".join(command)


def test_what_is_wrong_with_the_device_is_in_the_table(card, suites, tmp_path, capsys):
    card({"device": "cuda:0", "torch": "2.13.0", "fake": False})
    assert gpu.main(["--only", "check", "--json", str(tmp_path / "x.json")], suites(True)) == 1
    printed = capsys.readouterr().out
    assert "A card (cuda:0), driver 1" in printed and "**INT8 FAILED**: off by 1" in printed
    assert "FP8 not run: none" in printed
    assert "| small model at 50%, aimdo VBAR | the plain bits, 2.0 ms a step, 3 MB streamed |" in printed
    assert "| small model at 50%, software VBAR | **OTHER BITS**" in printed


def test_a_part_that_cannot_run_fails(card, suites, tmp_path):
    card({"device": "cuda:0", "torch": "2.13.0", "fake": False}, {"failed": "print_self_report.py ended with code -11"})
    path = tmp_path / "x.json"
    assert gpu.main(["--only", "check", "--only", "comfyui", "--json", str(path)], suites(True)) == 1
    result = json.loads(path.read_text())
    assert result["comfyui"] == {"failed": "no ComfyUI was found"} and "code -11" in gpu.table(result)


def test_a_process_answers_in_json_or_with_its_last_words(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PROCESSES", tmp_path)
    (tmp_path / "fine.py").write_text("print('noise'); print('{\"device\": \"cuda:0\"}')")
    (tmp_path / "dies.py").write_text("import os; os._exit(3)")
    (tmp_path / "raises.py").write_text("raise RuntimeError('no driver')")
    assert gpu.ask("fine.py", environment_of_tests()) == {"device": "cuda:0"}
    assert gpu.ask("dies.py", environment_of_tests()) == {"failed": "dies.py ended with code 3: no output"}
    assert "RuntimeError: no driver" in gpu.ask("raises.py", environment_of_tests())["failed"]


def test_the_process_that_looks_for_a_device_ends_with_an_answer():
    command = [sys.executable, str(gpu.PROCESSES / "find_device.py")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    assert len({"none", "device"} & set(json.loads(done.stdout))) == 1


def test_the_benchmarks_are_there():
    for name in gpu.BENCHMARKS:
        assert (gpu.ROOT / "benchmarks" / f"{name}.py").is_file()
    for path in gpu.SHORT:
        assert (gpu.ROOT / path).is_file()
