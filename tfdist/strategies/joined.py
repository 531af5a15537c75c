"""Which cluster this process has joined. TensorFlow joins one, and has no way out of it: a second one would pass the
preflight and hang in its first variable."""

from typing import Any

from tfdist.cluster.spec import Cluster
from tfdist.errors import UserError

_joined: list[tuple[Any, Cluster, dict[str, Any]]] = []  # at most one
_lost: list[str] = []  # or, instead, what became of it


def before(strategy: Any, cluster: Cluster, options: dict[str, Any]) -> Any | None:
    """The strategy that this process has already made of the same cluster with the same options, as when a notebook's cell
    runs again; None: it has joined no cluster. Raises `UserError` for any other one."""
    if _lost:
        raise _one_a_process(_lost[0])
    if not _joined:
        return None
    known, its_cluster, its_options = _joined[0]
    if (type(strategy), cluster, options) == (type(known), its_cluster, its_options):
        return known
    if cluster != its_cluster:
        found = f"a second one: {_named(cluster)} after {_named(its_cluster)}"
    else:
        found = f"the same one with other options: {_shown(strategy, options)} after {_shown(known, its_options)}"
    raise _one_a_process(found)


def begin() -> None:
    """TensorFlow is about to join: if that fails, it cannot try again."""
    _lost[:] = ["one that could not be joined whole"]


def remember(strategy: Any, cluster: Cluster, options: dict[str, Any]) -> None:
    """This process has joined the cluster."""
    _lost.clear()
    _joined.append((strategy, cluster, options))


def leave() -> None:
    """The strategy is closed."""
    _joined.clear()
    _lost[:] = ["one that was closed"]


def _one_a_process(found: str) -> UserError:
    return UserError(f"expected one cluster a process, found {found}; start a new process (restart the notebook's kernel)")


def _named(cluster: Cluster) -> str:
    return f"{cluster.task} at {cluster.address(cluster.task)} of {len(cluster.tasks)}"


def _shown(strategy: Any, options: dict[str, Any]) -> str:
    return f"{type(strategy).__name__}({', '.join(f'{name}={value!r}' for name, value in options.items())})"
