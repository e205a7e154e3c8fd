"""Runs that continue while a page is reloaded: each has an id, and a page that knows it can follow the run."""

import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator

from experiments.demo.request import GenerationRequest
from experiments.demo.session import Session, State

#: Number of jobs that are remembered.
MAX_JOBS = 8
#: Seconds that a run continues while no page follows it: longer than a page takes to reload.
PATIENCE = 30.0


class Job:
    """One run, which ends when it is done, when `stop` is set, or `patience` seconds after its last page left."""

    def __init__(self, session: Session, request: GenerationRequest, patience: float = PATIENCE) -> None:
        self.request, self.patience = request, patience
        self.stop = threading.Event()
        self._count, self._followers, self._has_ended = 0, 0, False
        self._state: State | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._run, args=(session,), daemon=True).start()

    def _run(self, session: Session) -> None:
        try:
            for state in session.run(self.request, self.stop):
                with self._changed:
                    self._state, self._count = state, self._count + 1
                    self._changed.notify_all()
        finally:
            with self._changed:
                self._has_ended = True
                self._changed.notify_all()

    def follow(self) -> Iterator[State]:
        """Yield the current state and later ones to the last; states that come too fast are skipped."""
        with self._changed:
            self._followers += 1
        seen = 0
        try:
            while True:
                with self._changed:
                    while self._count == seen:
                        if self._has_ended:
                            return
                        self._changed.wait()
                    seen, state = self._count, self._state
                yield state
        finally:
            with self._changed:
                self._followers -= 1
            timer = threading.Timer(self.patience, self._stop_if_alone)
            timer.daemon = True
            timer.start()

    def _stop_if_alone(self) -> None:
        with self._changed:
            if not self._followers:
                self.stop.set()


class Jobs:
    """The latest jobs of a session by their ids."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    def start(self, request: GenerationRequest) -> str:
        """Start a job and return its id."""
        name = secrets.token_hex(8)
        self._jobs[name] = Job(self._session, request)
        while len(self._jobs) > MAX_JOBS:
            self._jobs.popitem(last=False)
        return name

    def get(self, name: str) -> Job | None:
        """Return a job, or None if there is none with this id."""
        return self._jobs.get(name)
