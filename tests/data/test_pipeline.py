"""Order by step, host slices, evaluation batches and prefetching."""

import threading
import time

import numpy as np
import pytest
from scipy import stats

from lab.data.order import shuffled
from lab.data.pipeline import eval_batches, train_batch, train_indices
from lab.data.prefetch import Prefetch
from lab.errors import UserError


def process_rows(batch: int, process: int, processes: int) -> slice:
    return slice(batch * process // processes, batch * (process + 1) // processes)


class Rows:
    """Records whose content is their own index."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, indices):
        assert indices.min() >= 0 and indices.max() < self.size
        return {"x": indices * 10}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 16, 17, 64, 1000, 4096, 15685, 65537])
def test_each_epoch_is_a_permutation(size):
    for epoch in range(3):
        order = shuffled(np.arange(size), epoch, 5, size)
        assert order.dtype == np.uint32
        assert np.array_equal(np.sort(order), np.arange(size))


def test_largest_size_and_limits():
    size = 2**32 - 2**17
    found = shuffled(np.array([0, 1, size - 1]), 0, 0, size)
    assert len(set(found.tolist())) == 3 and found.max() < size
    for bad in (0, 2**32):
        with pytest.raises(ValueError):
            shuffled(0, 0, 0, bad)


def test_epochs_and_seeds_differ_and_repeat():
    position = np.arange(1000)
    orders = {(e, s): tuple(shuffled(position, e, s, 1000)) for e in range(4) for s in (0, 1, 2, 2**32, 2**40)}
    assert len(set(orders.values())) == len(orders)
    assert orders[2, 1] == tuple(shuffled(position, 2, 1, 1000))
    assert int(shuffled(17, 2, 1, 1000)) == orders[2, 1][17]  # one place alone: no state


def test_order_is_stable():
    """Golden values: a change here changes every run's batches."""
    assert shuffled(np.arange(10), 0, 0, 10).tolist() == GOLDEN[10]
    assert shuffled(np.arange(8), 3, 42, 15685).tolist() == GOLDEN[15685]
    assert train_indices(1, 6, 10, 0).tolist() == GOLDEN["straddle"]


@pytest.mark.parametrize("size", [3, 7, 16, 50])
def test_every_record_comes_first_equally_often(size):
    orders = np.array([shuffled(np.arange(size), epoch, 7, size) for epoch in range(2000)])
    for place in (0, size // 2, size - 1):
        assert stats.chisquare(np.bincount(orders[:, place], minlength=size)).pvalue > 1e-4
    # Negative control: rotations by the square of the epoch are permutations too, and fail.
    poor = np.array([(np.arange(size) + epoch**2) % size for epoch in range(2000)])
    assert stats.chisquare(np.bincount(poor[:, 0], minlength=size)).pvalue < 1e-4


def test_neighbours_are_independent():
    size = 50_000
    order = shuffled(np.arange(size), 0, 0, size).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.02
    assert abs(np.abs(order - np.arange(size)).mean() / size - 1 / 3) < 0.01  # of a random permutation


def test_same_under_jax_numpy():
    jnp = pytest.importorskip("jax.numpy")
    for size in (7, 1000, 15685):
        position = np.arange(min(size, 100))
        assert np.array_equal(shuffled(position, 2, 9, size), np.asarray(shuffled(position, 2, 9, size, jnp)))


@pytest.mark.parametrize(("size", "batch"), [(10, 3), (7, 7), (5, 12), (1, 4)])
def test_batches_make_whole_epochs(size, batch):
    epochs = 6
    stream = np.concatenate([train_indices(k, batch, size, 3) for k in range(-(-epochs * size // batch))])
    for epoch in range(epochs):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_no_training_record():
    with pytest.raises(UserError, match="no training record"):
        train_indices(0, 4, 0, 0)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_host_rows_give_the_global_batch(processes):
    whole = train_batch(Rows(100), 5, 8, 1)
    parts = [train_batch(Rows(100), 5, 8, 1, process_rows(8, p, processes)) for p in range(processes)]
    assert np.array_equal(np.concatenate([p["x"] for p in parts]), whole["x"])
    assert whole["weight"].dtype == np.float32 and whole["weight"].tolist() == [1] * 8
    assert not np.array_equal(whole["x"], train_batch(Rows(100), 6, 8, 1)["x"])


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (8, 4), (3, 8), (1, 1)])
def test_evaluation_counts_each_record_once(size, batch):
    batches = list(eval_batches(Rows(size), batch))
    assert all(b["x"].shape == b["weight"].shape == (batch,) for b in batches)
    real = np.concatenate([b["x"][b["weight"] == 1] for b in batches])
    assert real.tolist() == [10 * i for i in range(size)]
    assert sum(b["weight"].sum() for b in batches) == size
    halves = [list(eval_batches(Rows(size), 2 * batch, rows=process_rows(2 * batch, p, 2))) for p in (0, 1)]
    assert sum(b["weight"].sum() for half in halves for b in half) == size


def test_evaluation_limit_is_evenly_spaced():
    batches = list(eval_batches(Rows(10), 4, limit=5))
    found = np.concatenate([b["x"][b["weight"] == 1] for b in batches])
    assert found.tolist() == [0, 20, 40, 60, 80]
    assert sum(b["weight"].sum() for b in eval_batches(Rows(10), 4, limit=99)) == 10
    with pytest.raises(UserError, match="no record"):
        next(eval_batches(Rows(0), 4))


def test_prefetch_gives_all_in_order_and_works_ahead():
    made = []
    with Prefetch(lambda k: made.append(k) or k * k, 3, 9, depth=2) as stream:
        assert next(stream) == 9
        deadline = time.monotonic() + 5
        while len(made) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert made == [3, 4, 5]  # one taken, two waiting, no more
        assert list(stream) == [16, 25, 36, 49, 64]
        with pytest.raises(StopIteration):
            next(stream)


def test_prefetch_hides_the_work():
    def make(k):
        time.sleep(0.01)
        return k

    with Prefetch(make, 0, 20) as stream:
        for _ in stream:
            time.sleep(0.03)
    assert stream.wait_seconds < 0.15
    with Prefetch(make, 0, 20) as stream:  # negative control: a consumer that does nothing waits for all of it
        list(stream)
    assert stream.wait_seconds > 0.15


def test_prefetch_raises_where_the_result_was_due():
    def make(k):
        if k == 2:
            raise UserError("record 2 is broken")
        return k

    with Prefetch(make, 0, 5) as stream:
        assert [next(stream), next(stream)] == [0, 1]
        with pytest.raises(UserError, match="record 2"):
            next(stream)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_prefetch_closes_at_any_time(taken):
    stream = Prefetch(lambda k: k, 0, 10**9)
    for _ in range(taken):
        next(stream)
    begin = time.monotonic()
    stream.close()
    stream.close()
    assert time.monotonic() - begin < 1
    assert list(stream) == []
    assert not [t for t in threading.enumerate() if t is stream._thread]


def test_prefetch_closes_while_make_hangs():
    release = threading.Event()
    stream = Prefetch(lambda k: release.wait(30), 0, 3)
    begin = time.monotonic()
    stream.close()
    assert time.monotonic() - begin < 3
    release.set()


GOLDEN = {
    10: [1, 7, 3, 8, 2, 5, 4, 6, 0, 9],
    15685: [796, 8743, 14901, 4551, 8520, 5103, 3045, 7248],
    "straddle": [4, 6, 0, 9, 6, 0],
}
