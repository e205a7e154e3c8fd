"""Runs that go on while a page is reloaded: each has an id, and whoever knows it may follow the run."""

import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator

from experiments.demo.asked import Asked
from experiments.demo.session import Session, State

#: Jobs that are remembered, the last ones.
REMEMBERED = 8
#: Seconds that a run goes on without anybody who follows it: a page takes fewer to be loaded again.
PATIENCE = 30.0


class Job:
    """One run, which ends when it is done, when it is stopped, or when nobody has followed it for a while.

    Args:
        session: makes the images.
        asked: what to make.
        patience: seconds that it goes on without anybody who follows it.
    """

    def __init__(self, session: Session, asked: Asked, patience: float = PATIENCE) -> None:
        self.asked, self.patience = asked, patience
        self.stop = threading.Event()
        self._states, self._ended, self._followers = 0, False, 0
        self._last: State | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._run, args=(session,), daemon=True).start()

    def _run(self, session: Session) -> None:
        try:
            for state in session.run(self.asked, self.stop):
                with self._changed:
                    self._last, self._states = state, self._states + 1
                    self._changed.notify_all()
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def follow(self) -> Iterator[State]:
        """Yield the state that the run is in, and every later one that the caller is quick enough for, to the last."""
        with self._changed:
            self._followers += 1
        seen = 0
        try:
            while True:
                with self._changed:
                    while self._states == seen:
                        if self._ended:
                            return
                        self._changed.wait()
                    seen, state = self._states, self._last
                yield state
        finally:
            with self._changed:
                self._followers -= 1
            timer = threading.Timer(self.patience, self._leave)
            timer.daemon = True
            timer.start()

    def _leave(self) -> None:
        with self._changed:
            if not self._followers:
                self.stop.set()


class Jobs:
    """The last jobs of a session, by their ids.

    Args:
        session: makes the images.
        patience: as of `Job`.
    """

    def __init__(self, session: Session, patience: float = PATIENCE) -> None:
        self._session, self._patience = session, patience
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    def start(self, asked: Asked) -> str:
        """Start a job and return its id."""
        name = secrets.token_hex(8)
        self._jobs[name] = Job(self._session, asked, self._patience)
        while len(self._jobs) > REMEMBERED:
            self._jobs.popitem(last=False)
        return name

    def get(self, name: str) -> Job | None:
        """Return a job; None where there is none of this id."""
        return self._jobs.get(name)
