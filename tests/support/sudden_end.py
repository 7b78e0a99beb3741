"""Steps: the moments at which a process may be killed, counted, and its end at one of them.

Knows nothing of what is written.
"""


class Killed(BaseException):
    """The process is gone: nothing of it writes any more."""


class Steps:
    """Counts the moments at which a process may end, and ends it at one of them."""

    def __init__(self) -> None:
        self.left = -1
        self.is_dead = False

    def arm(self, left: int) -> None:
        self.left, self.is_dead = left, False

    def __call__(self) -> None:
        if self.left == 0:
            self.is_dead = True
        self.left -= 1
        if self.is_dead:
            raise Killed
