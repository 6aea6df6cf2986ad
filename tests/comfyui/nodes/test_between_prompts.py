"""While models are freed between two prompts, ComfyUI's queue answers, and the next prompt waits."""

import threading
from types import SimpleNamespace

import execution
import pytest

from spillway.nodes import between_prompts, model_actions, routes

SECONDS = 20
ITEM = (0, "a prompt", {}, {}, [], {})


@pytest.fixture
def slow(monkeypatch):
    """Freeing that goes on until it is let, and a model to free."""
    slow = SimpleNamespace(began=threading.Event(), go=threading.Event())

    def free(*_):
        slow.began.set()
        assert slow.go.wait(SECONDS)

    monkeypatch.setattr(routes, "free_models", free)
    monkeypatch.setattr(routes, "free_pins", free)
    monkeypatch.setattr(model_actions, "_do", free)
    model = SimpleNamespace(ledger=SimpleNamespace(number=1), device_bytes=0, pinned_bytes=0)
    monkeypatch.setattr(model_actions, "dynamic", SimpleNamespace(models=[model]))
    yield slow
    slow.go.set()


@pytest.fixture
def executor(monkeypatch):
    class Executor:
        ran = ()

        def execute(self, what):
            self.ran = (*self.ran, what)

    monkeypatch.setattr(execution, "PromptExecutor", Executor)
    return Executor()


def in_thread(call, *arguments):
    thread = threading.Thread(target=call, args=arguments, daemon=True)
    thread.start()
    return thread


WAYS = {
    "models": lambda queue: routes.free(queue, {"models": True}),
    "pins": lambda queue: routes.free(queue, {"pins": True}),
    "a button": lambda queue: model_actions.act(queue, model_actions.Action(1, model_actions.FREE_VRAM)),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_queue_answers_and_the_next_prompt_waits(way, slow, executor):
    assert between_prompts.install() and between_prompts.install()
    queue = execution.PromptQueue(SimpleNamespace(queue_updated=lambda: None))
    freeing = in_thread(WAYS[way], queue)
    assert slow.began.wait(SECONDS)
    asked = in_thread(lambda: (queue.get_current_queue_volatile(), queue.put(ITEM)))
    asked.join(SECONDS)
    assert not asked.is_alive(), "the server's event loop would stand still"
    working = in_thread(lambda: (queue.get(), executor.execute("it")))
    working.join(0.3)
    assert queue.currently_running and working.is_alive() and not executor.ran, "it waits for what is being freed"
    slow.go.set()
    for thread in (freeing, working):
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert executor.ran == ("it",)


@pytest.mark.parametrize("way", WAYS)
def test_what_runs_keeps_what_it_has(way, slow, executor):
    """It is in the queue's hands before it begins, so nothing is freed under it."""
    between_prompts.install()
    queue = execution.PromptQueue(SimpleNamespace(queue_updated=lambda: None))
    queue.put(ITEM)
    queue.get()
    slow.go.set()
    model_actions.dynamic.models[0].free = lambda: None  # keeps what is lent
    WAYS[way](queue)
    assert not slow.began.is_set()


def test_an_executor_that_does_not_wait_is_kept_off_by_the_queues_lock(slow, executor):
    """One that is not known, or that another pack has put in the place of ComfyUI's."""
    queue = execution.PromptQueue(SimpleNamespace(queue_updated=lambda: None))
    queue.put(ITEM)
    freeing = in_thread(WAYS["models"], queue)
    assert slow.began.wait(SECONDS)
    working = in_thread(lambda: (queue.get(), executor.execute("it")))
    working.join(0.3)
    assert not queue.currently_running and not executor.ran
    slow.go.set()
    freeing.join(SECONDS)
    working.join(SECONDS)
    assert executor.ran == ("it",)
