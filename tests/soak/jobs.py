"""A prompt that was sent to a server, and what came of it."""

import json
import time

from .compare import digests, key_of
from .invariants import error_of, wrong_error

SECONDS = 180


class Stuck(Exception):
    """A server runs no prompts any more. Nothing more can be learnt from it."""


class Job:
    """outcome: done, error, interrupted, refused, or lost with its server or its queue."""

    def __init__(self, server, prompt, files, faults, client="soak"):
        self.server, self.prompt, self.faults = server, prompt, faults
        self.key = key_of(prompt, files)  # of the files as they are now
        self.outcome, self.history, self.digests = None, None, {}
        try:
            status, answer = server.post("prompt", {"prompt": prompt, "client_id": client})
        except OSError:
            self.outcome = "lost"
            return
        self.number = answer.get("prompt_id") if status == 200 else None
        if self.number is None:
            self.outcome = "refused"
            self.history = answer

    def finish(self, *, may_be_lost=False, may_fail=False, given=None):
        """Wait for the end. may_be_lost: the queue was cleared. may_fail: an error is none, as long as it is clear."""
        if self.outcome is None:
            self.history = self._wait(may_be_lost)
            self.outcome = self._judge(may_fail, given)
        if self.outcome == "refused" and not may_fail:
            self.faults.add("refused", f"{json.dumps(self.history)[:700]} for {json.dumps(self.prompt)}")
        return self.outcome

    def _wait(self, may_be_lost):
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            if not self.server.is_up:
                if not self.server.killed:
                    self.faults.add("server ended", self.server.said()[-1500:])
                return None
            try:
                history = json.loads(self.server.ask(f"history/{self.number}")[1]).get(self.number)
                if history:
                    return history
                if may_be_lost and self.number not in self.server.ask("queue")[1].decode():
                    # It may have ended between the two questions.
                    return json.loads(self.server.ask(f"history/{self.number}")[1]).get(self.number)
            except OSError:  # it is being killed
                pass
            time.sleep(0.05)
        self.faults.add("stuck", f"no end after {SECONDS} s: {json.dumps(self.prompt)}\n{self.server.said()[-1500:]}")
        raise Stuck

    def _judge(self, may_fail, given):
        if self.history is None:
            return "lost"
        if self.history["status"]["status_str"] == "success":
            if not may_fail:  # what a wrong input made is compared with nothing
                self.digests = digests(self.server.base, self.prompt, self.history)
            return "done"
        error = error_of(self.history)
        if error is None:
            return "interrupted"
        wrong = wrong_error(error, given)
        if wrong or not may_fail:
            self.faults.add(
                "wrong error" if wrong else "failed",
                f"{wrong or error['node_type'] + ': ' + error['exception_message']}\nof {json.dumps(self.prompt)}",
            )
        return "error"
