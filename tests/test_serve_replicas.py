"""Several devices: copies of the model behind one queue, and a model divided among devices, give the same tokens."""

import threading

import jax
import pytest

pytest.importorskip("starlette", reason="LAB_EXTRAS=serve")

from lab.commands.serve_models import Options, _language
from lab.data.tokenizers import Bytes
from lab.errors import UserError
from lab.models.gpt import GPT
from lab.serve.engine import Busy, Closed, Request, collect
from lab.serve.sampling import Settings
from tests.serving import MODEL
from tests.test_generate import random_params
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

REQUESTS = [dict(ids=[i, 7, 2 * i], new_tokens=12, settings=Settings(0.8, 0.9, seed=i), stop=()) for i in range(7)]


def served(replicas, tensor, queue=4):
    model, text = GPT(**MODEL | {"position": "rotary", "kv_heads": 2}), Bytes().restore("")
    service = _language(Options("tiny", 2, 96, queue, 60.0, replicas=replicas, tensor=tensor), model,
                        {"params": random_params(model)}, text, lambda said: [1])
    service.start()
    assert service.engine.ready.wait(300)
    return service


def answers(service):
    found = [None] * len(REQUESTS)

    def run(i):
        found[i] = [token.id for token in collect(service.engine, **REQUESTS[i])[0]]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(REQUESTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found


def test_tokens_are_those_of_one_device():
    one = served(1, 1, queue=8)
    wanted = answers(one)
    assert one.close(5) and len({tuple(tokens) for tokens in wanted}) == 7
    for replicas, tensor in ((3, 1), (2, 2)):
        service = served(replicas, tensor)
        assert answers(service) == wanted
        gauges = {name: value() for name, (_, value) in service.gauges().items()}
        assert gauges == {"slots": 2 * replicas, "slots_busy": 0, "queue": 0}
        places = [{d.id for d in jax.tree.leaves(engine.slots._cache)[0].devices()}
                  for engine in service.engine._engines]
        assert sorted(sum(map(list, places), [])) == list(range(replicas * tensor))
        assert all(any(engine.slots.ids) for engine in service.engine._engines)  # each had work
        # The next turn goes where the text is, whoever else is free.
        turn = REQUESTS[3] | {"ids": [*REQUESTS[3]["ids"], *wanted[3], 5]}
        assert collect(service.engine, **turn)[2].reused == len(turn["ids"]) - 2
        assert service.close(5)
        with pytest.raises(Closed):
            service.engine.submit(Request(**REQUESTS[0], emit=print))


def test_a_request_waits_where_fewest_do_and_all_queues_can_be_full(monkeypatch):
    model = GPT(**MODEL)
    service = _language(Options("tiny", 2, 96, 1, 60.0, replicas=2), model, {"params": random_params(model)},
                        Bytes().restore(""), lambda said: [1])
    for _ in range(6):  # two slots and a place in the queue each; the threads were not started
        service.engine.submit(Request(**REQUESTS[0], emit=print))
    assert [len(engine.waiting) for engine in service.engine._engines] == [3, 3]
    with pytest.raises(Busy):
        service.engine.submit(Request(**REQUESTS[0], emit=print))
    with pytest.raises(UserError, match="needs 16 devices; this machine has 8"):
        _language(Options("tiny", 2, 96, 1, 60.0, replicas=4, tensor=4), model, {"params": random_params(model)},
                  Bytes().restore(""), lambda said: [1])
