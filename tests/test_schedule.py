"""Which step runs next under parameter servers: every order of beginnings, ends and losses keeps the promises."""

import random
import threading

import pytest

from tfdist.strategies.schedule import Schedule


def play(seed: int, workers: int, steps: int, parts: int, max_staleness: int | None, losses: float):
    """Workers take, finish and lose tasks in random order. Returns the schedule and, for each result that counts, its step,
    its part, and how many others were finished between its begin and its end."""
    rng, schedule = random.Random(seed), Schedule(5, parts, max_staleness)
    schedule.allow(5 + steps)
    running, finished, parts_done = [], [], {}
    for _ in range(100_000):
        if schedule.is_quiet:
            break
        if rng.random() < 0.5 and len(running) < workers and (task := schedule.take(f"worker {len(running)}")):
            running.append((task, len(finished)))
        elif running:
            task, began = running.pop(rng.randrange(len(running)))
            if rng.random() < losses:
                assert schedule.lost(task) and not schedule.finish(task, None)
                continue
            assert schedule.finish(task, None)
            finished.append((task.step, task.part, len(finished) - began))
            parts_done[task.step] = parts_done.get(task.step, 0) + 1
            if parts > 1 and parts_done[task.step] == parts:
                schedule.step_applied()
    return schedule, finished


@pytest.mark.parametrize("max_staleness", [None, 0, 1, 3])
@pytest.mark.parametrize("losses", [0.0, 0.3])
def test_every_step_counts_once_and_staleness_is_bounded(max_staleness, losses):
    reruns = 0
    for seed in range(30):
        schedule, finished = play(seed, workers=4, steps=40, parts=1, max_staleness=max_staleness, losses=losses)
        reruns += len(schedule.reruns)
        assert sorted(step for step, _, _ in finished) == list(range(5, 45))
        if max_staleness is not None:
            assert max(between for *_, between in finished) <= max_staleness
    assert bool(reruns) == bool(losses)
    if max_staleness is None:
        assert max(between for *_, between in finished) > 1, "workers do run beside each other"


def test_parts_of_a_step_wait_for_the_update_before():
    for seed in range(30):
        _, finished = play(seed, workers=3, steps=20, parts=3, max_staleness=None, losses=0.2)
        assert [step for step, _, _ in finished] == sorted(step for step, _, _ in finished)
        assert len({(step, part) for step, part, _ in finished}) == len(finished) == 60


def test_a_stop_lets_what_was_begun_end():
    schedule = Schedule(0, parts=2)
    schedule.allow(10)
    first = schedule.take("worker 0")
    schedule.stop()
    second = schedule.take("worker 1")
    assert (second.step, second.part) == (0, 1) and not schedule.is_quiet
    assert schedule.finish(first, "a") and schedule.finish(second, "b") and schedule.is_quiet
    assert [result for *_, result in schedule.results(5, 1.0)] == ["a", "b"]
    assert schedule.take("worker 0") is None


def test_a_result_of_a_worker_that_was_given_up_does_not_count():
    schedule = Schedule(0)
    schedule.allow(1)
    task = schedule.take("worker 0")
    assert schedule.lost(task) and not schedule.lost(task)
    again = schedule.take("worker 1")
    assert again.step == task.step and not schedule.finish(task, "late") and schedule.finish(again, "again")
    assert [result for *_, result in schedule.results(1, 1.0)] == ["again"] and schedule.reruns == [0]


def test_an_error_of_one_worker_wakes_the_chief():
    schedule = Schedule(0)
    schedule.allow(1)
    schedule.take("worker 0")
    threading.Timer(0.05, schedule.fail, [ZeroDivisionError("of a step")]).start()
    with pytest.raises(ZeroDivisionError, match="of a step"):
        schedule.results(1, 10.0)
    assert schedule.take("worker 1") is None
