"""Where this process is in its run, for whoever listens: bars, the watchdog, preemption, tests."""

from collections.abc import Callable

Listener = Callable[[str, int, int], None]


class Progress:
    """Points of the run that the main thread has passed, told to listeners in their order.

    A listener may raise to end the run there; those after it are then not told.

    Attributes:
        phase: What the main thread is in, such as `rollout`; of `save.fsync` it is `save`.
        passed: Points passed so far.
    """

    def __init__(self) -> None:
        self.phase = "setup"
        self.passed = 0
        self._listeners: list[Listener] = []

    def subscribe(self, listener: Listener, first: bool = False) -> None:
        """Have a listener told of every point, after those that listen already or before them."""
        self._listeners.insert(0 if first else len(self._listeners), listener)

    def unsubscribe(self, listener: Listener) -> None:
        """Tell a listener nothing more; one that never listened is no error."""
        if listener in self._listeners:
            self._listeners.remove(listener)

    def report(self, point: str, done: int = 0, total: int = 0) -> None:
        """Pass a point.

        Args:
            point: Such as `rollout` or `save.fsync`.
            done: Units of work done in this phase.
            total: Of so many; 0 where the work has no length.
        """
        self.phase = point.partition(".")[0]
        self.passed += 1
        for listener in tuple(self._listeners):
            listener(point, done, total)


progress = Progress()
"""Of this process."""
