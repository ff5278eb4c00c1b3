"""What a resize costs beside rebuilding the loader, and what a resizable loader costs at a constant size.

Cost: a loop takes batches, and at some batch it asks for another size, once by setting it, and once by
building a new DataLoader that goes on with the samples that are left. Until the first batch of the new size
is there, reported are

    stall       how long the loop had to wait in all, less what it waited for as many samples before
    delivery    the time from the request to that batch; of the resizable loader the batches on the way are
                useful work, of the rebuilt one there are none
    request     the time that asking takes

in a loop that trains longer on a batch than the workers take to make one, where the stall is what training
loses, and in one that only takes batches, where a larger batch takes longer to come and the next ones follow
the closer.

Throughput: the plain and the resizable loader in turn, as a ratio, and the difference per batch; without
workers by processor time, which other programs on the machine change little.

    python benchmarks/resize.py [--repeats 15] [--workers 4]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler

from adaptive_batch import make_adaptive

SAMPLES = 6000
SMALL, LARGE = 32, 64
REQUEST_AFTER = 20  # batches


class Images(Dataset[Tensor]):
    """Samples of 12 KB, slightly augmented; ``seconds`` stands for reading and decoding one."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.pixels = torch.randint(0, 256, (SAMPLES, 3, 32, 32), dtype=torch.uint8)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        if self.seconds:
            time.sleep(self.seconds)  # without taking the processor from the loop
        return self.pixels[index].flip(2).float().sub(128.0).div(64.0)


class Took(NamedTuple):
    wait: float
    there: float
    size: int


class Cost(NamedTuple):
    stall: float
    delivery: float
    request: float


def timed(batches: Iterator[Any], step: float) -> Iterator[Took]:
    """Each batch's wait, when it was there, and its size; the loop trains for ``step`` seconds a sample."""
    while True:
        before = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        now = time.perf_counter()
        yield Took(now - before, now, len(batch))
        if step:
            time.sleep(step * len(batch))


def loader_of(data: Dataset[Tensor], size: int, workers: int, indices: Any = None) -> DataLoader[Tensor]:
    sampler = SubsetRandomSampler(indices if indices is not None else range(SAMPLES))
    return DataLoader(data, size, sampler=sampler, num_workers=workers)


def cost_of(before: list[Took], after: list[Took], asked: float, request: float) -> Cost:
    """Of all batches from the request on, up to the first one of the new size."""
    first = next(i for i, took in enumerate(after) if took.size == LARGE)
    usual = statistics.median(took.wait / took.size for took in before[REQUEST_AFTER // 2 :])
    waited = sum(took.wait - usual * took.size for took in after[: first + 1])
    return Cost(waited, after[first].there - asked, request)


def resize(data: Dataset[Tensor], workers: int, step: float) -> Cost:
    loader: Any = make_adaptive(loader_of(data, SMALL, workers))
    batches = timed(iter(loader), step)
    before = [next(batches) for _ in range(REQUEST_AFTER)]
    asked = time.perf_counter()
    loader.batch_sampler.batch_size = LARGE
    request = time.perf_counter() - asked
    return cost_of(before, [next(batches) for _ in range(20)], asked, request)


def rebuild(data: Dataset[Tensor], workers: int, step: float) -> Cost:
    loader = loader_of(data, SMALL, workers)
    iterator = iter(loader)
    batches = timed(iterator, step)
    before = [next(batches) for _ in range(REQUEST_AFTER)]
    asked = time.perf_counter()
    del batches, iterator, loader  # the old workers end here
    left = torch.randperm(SAMPLES)[REQUEST_AFTER * SMALL :].tolist()
    batches = timed(iter(loader_of(data, LARGE, workers, left)), step)
    request = time.perf_counter() - asked
    first = next(batches)
    return cost_of(before, [first._replace(wait=first.there - asked)], asked, request)


def seconds_per_batch(loader: DataLoader[Tensor], clock: Callable[[], float]) -> float:
    """From the second batch on: starting the workers is no throughput."""
    iterator = iter(loader)
    next(iterator)
    started = clock()
    count = sum(1 for _ in iterator)
    return (clock() - started) / count


def spread(values: list[float], unit: float = 1.0, digits: int = 2) -> str:
    low, high = min(values) * unit, max(values) * unit
    return f"{statistics.median(values) * unit:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def times_less(theirs: list[float], ours: float) -> str:
    return f"{statistics.median(theirs) / ours:.0f} times less" if ours > 0 else "none at all"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--workers", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    data = Images(0.0002)
    workers, repeats = arguments.workers, arguments.repeats
    print(f"{SMALL} -> {LARGE} samples with {workers} workers, ms, median [min, max] of {repeats}")
    for loop, step in (("a loop that trains", 0.0003), ("a loop that only takes batches", 0.0)):
        print(f"  {loop}")
        pairs = [(resize(data, workers, step), rebuild(data, workers, step)) for _ in range(repeats)]
        for name in Cost._fields:
            ours, theirs = ([getattr(pair[i], name) for pair in pairs] for i in (0, 1))
            values = f"resized {spread(ours, 1e3):<24} rebuilt {spread(theirs, 1e3):<24}"
            print(f"    {name:<10} {values} {times_less(theirs, statistics.median(ours))}", flush=True)
            if name == "stall":
                worst = times_less(theirs, max(ours))
                print(f"    {'':<10} the worst resize beside the median rebuild: {worst}")
    print("throughput at a constant size, resizable / plain, median [min, max]")
    for number, seconds, clock in ((0, 0.0, time.process_time), (workers, 0.0002, time.perf_counter)):
        images = Images(seconds)
        times = []
        for _ in range(4 * repeats):
            plain, resizable = (
                seconds_per_batch(make(DataLoader(images, SMALL, shuffle=True, num_workers=number)), clock)
                for make in (lambda loader: loader, make_adaptive)
            )
            times.append((plain, resizable))
        ratios = spread([plain / resizable for plain, resizable in times], digits=3)
        more = statistics.median(resizable - plain for plain, resizable in times)
        plain = statistics.median(plain for plain, _ in times)
        print(f"  {number} workers   {ratios}   {1e6 * more:+.1f} us on {1e6 * plain:.0f} us per batch")


if __name__ == "__main__":
    main()
