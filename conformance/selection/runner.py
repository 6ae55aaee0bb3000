"""Calls a selector on every cell of a grid, in worker processes, and collects the codes of what it did."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from conformance.decisions.watch import WITHOUT_DECISION, RuleWatch
from conformance.selection.facts import Array
from conformance.selection.grid import Product
from conformance.selection.outcomes import Classifier
from fp8moe import BackendSpec

Select = Callable[..., Any]
Subset = tuple[BackendSpec, ...]
Progress = Callable[[int, int], None]
CHUNK = 40_000
"""Cells a job: about a tenth of a second."""


class Job(NamedTuple):
    """Some cells of one product.

    ``subsets`` gives for each the index of the candidates to pass as ``backends``; ``ruled`` asks for the rule as well.
    """

    product: int
    numbers: Array
    subsets: Array | None = None
    ruled: bool = False


@dataclass(frozen=True)
class Task:
    """What every job shares. It reaches the workers by fork, so that any selector will do, a closure too."""

    select: Select
    classifier: Classifier
    products: Sequence[Product]
    subsets: Sequence[Subset] = ()

    def outcomes(self, job: Job) -> Array:
        """Codes of the selector's answers, in the order of the job's cells; of a ruled job as ``ruled`` gives them."""
        if job.ruled:
            return self.ruled(job)
        select, result, error_code = self.select, self.classifier.result, self.classifier.error
        columns = self.products[job.product].columns(job.numbers)
        codes = bytearray()
        append = codes.append
        if job.subsets is None:
            for platform, (weight_key, activation_key), config, allow, env in columns:
                try:
                    answer = select(config, weight_key, activation_key, allow, platform=platform, env=env)
                except Exception as error:
                    append(error_code(error))
                else:
                    append(result(answer))
        else:
            candidates = map(self.subsets.__getitem__, job.subsets.tolist())
            for (platform, (weight_key, activation_key), config, allow, env), backends in zip(
                columns, candidates, strict=True
            ):
                try:
                    answer = select(
                        config, weight_key, activation_key, allow, platform=platform, env=env, backends=backends
                    )
                except Exception as error:
                    append(error_code(error))
                else:
                    append(result(answer))
        return np.frombuffer(codes, dtype=np.uint8)

    def ruled(self, job: Job) -> Array:
        """(2, cells): codes of the selector's answers, and below them those of the rules that it came to them by."""
        select, result, error_code = self.select, self.classifier.result, self.classifier.error
        codes, rules = bytearray(), bytearray()
        append, append_rule = codes.append, rules.append
        with RuleWatch() as watch:
            for platform, (weight_key, activation_key), config, allow, env in self.products[job.product].columns(
                job.numbers
            ):
                watch.rule = WITHOUT_DECISION
                try:
                    answer = select(config, weight_key, activation_key, allow, platform=platform, env=env)
                except Exception as error:
                    append(error_code(error))
                else:
                    append(result(answer))
                append_rule(watch.rule)
        return np.stack([np.frombuffer(codes, dtype=np.uint8), np.frombuffer(rules, dtype=np.uint8)])


_task: Task | None = None


def _work(job: Job) -> Array:
    if _task is None:
        raise RuntimeError("the worker was not forked from a parent with a task")
    return _task.outcomes(job)


def default_processes() -> int:
    """Two where this process may use two cores, else one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(2, cores)


@contextmanager
def workers(task: Task, processes: int) -> Iterator[Callable[[Sequence[Job], Progress | None], list[Array]]]:
    """A function that runs jobs in forked workers and gives their outcomes in the jobs' order.

    Without fork (Windows), or with ``processes`` 0, the jobs run in this process.
    """
    global _task
    pool = None
    if processes > 0 and "fork" in multiprocessing.get_all_start_methods():
        _task = task
        gc.freeze()  # keeps the collector from touching, and so copying, what the workers share
        try:
            pool = multiprocessing.get_context("fork").Pool(processes)
        finally:
            gc.unfreeze()
            _task = None

    def run(jobs: Sequence[Job], progress: Progress | None = None) -> list[Array]:
        total, done, found = sum(len(job.numbers) for job in jobs), 0, []
        for job, outcomes in zip(jobs, pool.imap(_work, jobs) if pool else map(task.outcomes, jobs), strict=True):
            found.append(outcomes)
            done += len(job.numbers)
            if progress is not None:
                progress(done, total)
        return found

    try:
        yield run
    finally:
        if pool is not None:
            pool.terminate()
            pool.join()


def whole_grid(products: Sequence[Product], ruled: bool = False) -> list[Job]:
    """Jobs that cover every cell of every product."""
    return [
        Job(index, np.arange(start, min(start + CHUNK, product.size)), ruled=ruled)
        for index, product in enumerate(products)
        for start in range(0, product.size, CHUNK)
    ]


def by_product(jobs: Sequence[Job], outcomes: Sequence[Array], products: Sequence[Product]) -> list[Array]:
    """The outcomes of ``whole_grid`` as one array a product, of the product's shape."""
    parts: list[list[Array]] = [[] for _ in products]
    for job, codes in zip(jobs, outcomes, strict=True):
        parts[job.product].append(codes)
    return [np.concatenate(codes).reshape(product.shape) for codes, product in zip(parts, products, strict=True)]
