"""Waiting questions → answers, in batches, on one thread: `Engine` takes `Job`s."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from moellava.model.conversation import answer_batch
from moellava.model.generation import GrowingAnswer
from moellava.model.prompts import ChatModel
from moellava.model.turns import Turn

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """A question and its growing answer.

    Args:
        settings: options for `generate`; jobs of equal settings are answered together.
        seed: a job with a seed is answered alone, so that its answer does not depend on others.
        on_done: called once, with the error if there was one, in the engine's thread.
    """

    turns: Sequence[Turn]
    answer: GrowingAnswer
    num_prompt_tokens: int
    on_done: Callable[[BaseException | None], None]
    settings: Mapping[str, object] = field(default_factory=dict)
    top_logprobs: int | None = None
    seed: int | None = None

    def goes_with(self, other: "Job") -> bool:
        """Whether the two may be answered as one batch."""
        is_alone = self.seed is not None or other.seed is not None
        return not is_alone and (self.settings, self.top_logprobs) == (
            other.settings,
            other.top_logprobs,
        )


class Engine:
    """Answers jobs in the order in which they came, those of equal settings together."""

    def __init__(self, loaded: ChatModel, *, max_batch: int) -> None:
        self._loaded = loaded
        self._max_batch = max_batch
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._work, name="moellava-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether jobs are taken."""
        return self._thread.is_alive() and not self._is_stopping

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn."""
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()

    def stop(self) -> None:
        """End after the present batch; jobs that wait are cancelled."""
        with self._changed:
            self._is_stopping = True
            for job in self._waiting:
                job.answer.cancel()
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            open_jobs = [job for job in batch if not job.answer.is_done]
            error: BaseException | None = None
            try:
                if open_jobs:
                    self._answer(open_jobs)
            except Exception as caught:
                logger.exception("a batch of %d failed", len(open_jobs))
                error = caught
            for job in batch:
                job.on_done(error if job in open_jobs else None)

    def _next_batch(self) -> list[Job] | None:
        with self._changed:
            while not self._waiting:
                if self._is_stopping:
                    return None
                self._changed.wait()
            first = self._waiting.popleft()
            batch = [first]
            for job in list(self._waiting):
                if len(batch) < self._max_batch and first.goes_with(job):
                    self._waiting.remove(job)
                    batch.append(job)
            return batch

    def _answer(self, jobs: Sequence[Job]) -> None:
        with torch.random.fork_rng(enabled=jobs[0].seed is not None):
            if (seed := jobs[0].seed) is not None:
                torch.manual_seed(seed)
            answer_batch(
                self._loaded,
                [job.turns for job in jobs],
                [job.answer for job in jobs],
                top_logprobs=jobs[0].top_logprobs,
                **jobs[0].settings,
            )
