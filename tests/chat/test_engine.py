import threading

import pytest

from moellava.chat.engine import Engine, Job
from moellava.model.conversation import start_answer
from moellava.model.turns import read_message


def job(loaded, done, text="Hello?", max_new_tokens=4, **options):
    turns = [read_message(loaded.processor, {"role": "user", "content": text})]
    answer, num_tokens = start_answer(loaded, turns, max_new_tokens=max_new_tokens)
    return Job(turns, answer, num_tokens, done, **options)


SAMPLED = {"do_sample": True, "temperature": 0.5}


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        ({}, {}, True),
        ({"settings": SAMPLED}, {"settings": dict(SAMPLED)}, True),
        ({"settings": SAMPLED}, {}, False),
        ({"top_logprobs": 0}, {}, False),
        ({"settings": SAMPLED, "seed": 1}, {"settings": SAMPLED, "seed": 1}, False),
    ],
)
def test_jobs_of_equal_settings_go_together(loaded, first, second, together):
    one, other = (job(loaded, print, **options) for options in (first, second))
    assert one.goes_with(other) is together


def test_stopping_ends_what_waits_and_tells_it(loaded):
    ended, started = [], threading.Event()
    engine = Engine(loaded, max_batch=1)
    jobs = [job(loaded, ended.append, max_new_tokens=1000) for _ in range(3)]
    jobs[0].answer.on_piece = lambda _: started.set()
    for item in jobs:
        engine.submit(item)
    started.wait()
    assert engine.is_alive
    jobs[0].answer.cancel()
    engine.stop()
    assert not engine.is_alive
    assert ended == [None] * 3
    assert {item.answer.finish_reason for item in jobs} == {"cancelled"}


def test_a_failed_batch_is_told_and_the_next_one_answered(loaded, monkeypatch):
    outcomes, told = [], threading.Semaphore(0)

    def done(error):
        outcomes.append(type(error))
        told.release()

    engine = Engine(loaded, max_batch=1)
    with monkeypatch.context() as patch:
        patch.setattr(loaded.model, "forward", lambda **_: 1 / 0)
        engine.submit(job(loaded, done))
        told.acquire()
    engine.submit(job(loaded, done))
    told.acquire()
    engine.stop()
    assert outcomes == [ZeroDivisionError, type(None)]
