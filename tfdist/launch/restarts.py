"""Who is restarted when a process fails, how soon and how often. Pure."""

import dataclasses

from tfdist.errors import INTERNAL

# The whole policy. A collective group cannot take back one member: TensorFlow's collectives are broken for good once a
# peer is gone. A parameter-server worker holds no state, and an evaluator trains with nobody.
WHOLE_GROUP, ALONE = "whole group", "alone"
POLICY = {
    # (role, cluster has parameter servers): who starts again
    ("chief", False): WHOLE_GROUP,
    ("worker", False): WHOLE_GROUP,
    ("evaluator", False): ALONE,
    ("chief", True): WHOLE_GROUP,
    ("worker", True): ALONE,
    ("ps", True): WHOLE_GROUP,
    ("evaluator", True): ALONE,
}

SAME_ERROR_TIMES = 3
_BACK_OFF_S, _LONGEST_BACK_OFF_S = 1.0, 30.0


def may_help(exit_code: int) -> bool:
    """Whether starting again can change anything: a lost machine or a bug that strikes at times, yes; bad usage, no."""
    return exit_code >= 128 or exit_code == INTERNAL


@dataclasses.dataclass
class Budget:
    """Decides after each failure whether to start again."""

    max_restarts: int
    used: int = 0
    last: tuple[str, int] | None = None
    in_a_row: int = 0

    def next_start_in_s(self, exit_code: int, error: str, step: int) -> float | None:
        """Seconds to wait before the next start; None: no more, `why_not` says why. `error` and `step` name the failure:
        the same error at the same step three times is not going to go away."""
        self.in_a_row = self.in_a_row + 1 if self.last == (error, step) else 1
        self.last = (error, step)
        if self.why_not(exit_code):
            return None
        self.used += 1
        return min(_BACK_OFF_S * 2 ** (self.in_a_row - 1), _LONGEST_BACK_OFF_S)

    def why_not(self, exit_code: int) -> str:
        """Why there is no further start; empty: there is one."""
        if not may_help(exit_code):
            return f"exit code {exit_code}: starting again would not help"
        if self.in_a_row >= SAME_ERROR_TIMES:
            return f"the same error came {self.in_a_row} times at the same step"
        if self.used >= self.max_restarts:
            return f"{self.used} of {self.max_restarts} restarts are used"
        return ""
