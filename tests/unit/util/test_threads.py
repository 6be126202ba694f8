"""Work on parts side by side."""

import os
import threading

import pytest
import torch

from qcbguard_plugins._util.threads import map_over_threads, stream_over_threads


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("over_threads", [map_over_threads, lambda work, items: list(stream_over_threads(work, items))])
def test_results_keep_their_order(over_threads):
    assert over_threads(lambda item: item * item, list(range(50))) == [item * item for item in range(50)]


def test_threads_stay_and_do_not_split_operations_further():
    def look(_):
        return threading.get_ident(), torch.get_num_threads()

    first, second = map_over_threads(look, range(30)), map_over_threads(look, range(30))
    assert len({ident for ident, _ in first + second}) <= 3
    assert {count for _, count in first + second} == {1}
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("over_threads", [map_over_threads, lambda work, items: list(stream_over_threads(work, items))])
def test_nothing_runs_on_after_a_failure(over_threads):
    running, started = set(), threading.Barrier(3)

    def work(item):
        running.add(item)
        try:
            if item < 3:
                started.wait(10)
            if item == 0:
                raise ValueError("zero")
            # Long enough to be under way when the failure is seen.
            threading.Event().wait(0.05)
        finally:
            running.discard(item)

    with pytest.raises(ValueError, match="zero"):
        over_threads(work, list(range(200)))
    assert not running


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_starts_threads_of_its_own():
    map_over_threads(abs, [1, 2, 3])
    child = os.fork()
    if child == 0:
        os._exit(0 if map_over_threads(abs, [-1, -2, -3]) == [1, 2, 3] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
