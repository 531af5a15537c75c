"""What processes, their supervisors and the launcher say to each other, and what of that is none of it. Pure.

One JSON object a line. Both ends are of one version, so each field is there, and right, or the message is malformed.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from tfdist.cluster.spec import JOBS

Fields = Mapping[str, Callable[[Any], bool]]


class Malformed(ValueError):
    """A message that nobody of ours sends."""


def _is_count(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 62


def _is_exit_code(value: Any) -> bool:
    """The system keeps 8 bits of it: of 256 nothing is left, and a failure would be a success."""
    return type(value) is int and 0 <= value <= 255


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e12


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_task(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and value[0] in JOBS and _is_count(value[1])


def _or_none(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_right(value)


# from a process to its supervisor
BEAT: Fields = {"phase": _is_text} | dict.fromkeys(("step", "batches", "steps", "ticks"), _is_count)
# from a supervisor to the leader's
STATUS: Fields = {
    **BEAT,
    **dict.fromkeys(("suspended", "exiting", "must_beat"), _is_flag),
    "silent_s": _or_none(_is_seconds),
    "exit_code": _or_none(_is_exit_code),
}
# from a supervisor to its launcher
END: Fields = {"exit_code": _is_exit_code, "message": _is_text, "task": _or_none(_is_task), "step": _is_count}
# from the leader's supervisor to the others
END_OF_ALL: Fields = {**END, "stacks": _is_flag}
CHILD = "child"  # a process id, to the launcher
TO_LAUNCHER, TO_LEADER, TO_MEMBER = (CHILD, "end"), ("status", "stop"), ("alive", "stop", "end")


def parse(line: bytes) -> dict[str, Any]:
    """One line of a socket of this machine. Raises `Malformed`."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise Malformed(f"a line that is no JSON object: {line[:40]!r}")
    return message


def known(message: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Raises `Malformed` unless the message has one of these names, and no other. What has no fields is `true`."""
    if not message or not message.keys() <= set(names):
        raise Malformed(f"expected {' or '.join(names)}, found {', '.join(map(repr, message))[:80] or 'nothing'}")
    for name in message.keys() & {"alive", "stop"}:
        if message[name] is not True:
            raise Malformed(f"{name}: {_shown(message[name])}")


def check(message: Any, fields: Fields, what: str) -> dict[str, Any]:
    """The message, whose fields are all as they must be. Raises `Malformed`, which names the first that is not."""
    if not isinstance(message, dict):
        raise Malformed(f"{what}: {_shown(message)}")
    for name, is_right in fields.items():
        if name not in message or not is_right(message[name]):
            raise Malformed(f"{what}.{name}: {_shown(message[name]) if name in message else 'missing'}")
    return message


def pid(value: Any) -> int:
    """Of a process that a supervisor has started."""
    if not _is_count(value) or value <= 1:
        raise Malformed(f"{CHILD}: {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    is_plain = value is None or isinstance(value, (str, int, float))
    return f"{value!r:.60}" if is_plain else f"a {type(value).__name__}"
