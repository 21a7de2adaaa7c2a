"""How many artifacts are made at once: never more than cores, runtimes and memory allow."""

import os

import pytest

from edgeship.core.inventory import Inventory, OpCost, WeightUse
from edgeship.engine import room
from edgeship.errors import UsageError

GB = 1000**3


def network(parameters: int, activations: int = 1000) -> Inventory:
    use = WeightUse("w", "linear", (parameters, 1), 0)
    return Inventory((use,), (OpCost("n", "linear", parameters, 1, 1, ("w",)),), activations)


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    monkeypatch.delenv(room.VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("parameters", "free", "cores", "runtimes", "wanted"),
    [
        (4_000_000, 20 * GB, 2, 5, 2),
        (4_000_000, 20 * GB, 16, 5, 5),
        (4_000_000, 20 * GB, 1, 5, 1),
        (4_000_000, 20 * GB, 8, 1, 1),
        # One at a time where two and this process do not fit.
        (4_000_000, 3 * GB, 8, 5, 1),
        (4_000_000, 4 * GB, 8, 5, 2),
        (1_240_000_000, 24 * GB, 8, 4, 1),
        (3_200_000_000, 24 * GB, 8, 4, 1),
        (86_000_000, 24 * GB, 8, 5, 5),
        (86_000_000, 12 * GB, 8, 5, 2),
    ],
)
def test_cores_runtimes_and_memory_each_set_an_end(monkeypatch, parameters, free, cores, runtimes, wanted):
    monkeypatch.setattr(room, "free_bytes", lambda: free)
    monkeypatch.setattr(room, "cores", lambda: cores)
    found = room.jobs_for(None, network(parameters), runtimes)
    assert found == wanted
    # What all of them take together, and this process, lies below what is free, where more than one runs.
    assert found == 1 or (found + 1) * room.forecast(network(parameters)) <= free


def test_what_the_user_says_is_done(monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda: 0)
    monkeypatch.setattr(room, "cores", lambda: 1)
    assert room.jobs_for(3, network(1), 5) == 3
    assert room.jobs_for(9, network(1), 5) == 5
    assert room.jobs_for(1, network(1), 5) == 1
    monkeypatch.setenv(room.VARIABLE, "2")
    assert room.jobs_for(None, network(1), 5) == 2
    assert room.jobs_for(4, network(1), 5) == 4


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "100000"])
def test_a_variable_that_says_no_number_is_refused(monkeypatch, text):
    monkeypatch.setenv(room.VARIABLE, text)
    with pytest.raises(UsageError, match=room.VARIABLE):
        room.wanted_jobs(None, 5)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_cores_that_a_process_may_not_use_do_not_count():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert room.cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.fixture
def container(tmp_path, monkeypatch):
    """A container's limits as files: the second version of control groups, or the first."""
    monkeypatch.setattr(room, "_cgroups", lambda controller: [tmp_path])
    monkeypatch.setattr(os, "sched_getaffinity", lambda number: set(range(64)), raising=False)

    def write(**files):
        for name, text in files.items():
            (tmp_path / name.replace("__", ".")).write_text(text)

    return write


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"cpu__max": "200000 100000"}, 2),
        ({"cpu__max": "150000 100000"}, 1),
        ({"cpu__max": "50000 100000"}, 1),
        ({"cpu__max": "max 100000"}, 64),
        ({"cpu__cfs_quota_us": "400000", "cpu__cfs_period_us": "100000"}, 4),
        ({"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"}, 64),
    ],
)
def test_a_container_has_the_cores_that_its_limits_say(container, files, wanted):
    container(**files)
    assert room.cores() == wanted


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"memory__max": "3000", "memory__current": "2000", "memory__stat": "anon 5\ninactive_file 500\n"}, 1500),
        ({"memory__limit_in_bytes": "3000", "memory__usage_in_bytes": "2000"}, 1000),
        (
            {
                "memory__limit_in_bytes": "3000",
                "memory__usage_in_bytes": "2000",
                "memory__stat": "total_inactive_file 7",
            },
            1007,
        ),
        ({"memory__max": "3000", "memory__current": "4000"}, 0),
    ],
)
def test_a_container_has_the_memory_that_its_limits_leave(container, files, wanted):
    container(**files)
    assert room.free_bytes() == wanted


def test_a_container_without_limits_has_what_the_machine_has(container):
    import psutil

    container(memory__max="max")
    assert abs(room.free_bytes() - psutil.virtual_memory().available) < 2 * GB
