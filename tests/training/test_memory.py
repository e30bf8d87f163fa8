"""What a training keeps of the memory that it frees."""

import multiprocessing
import resource

import torch

from mvqkd.training.memory import keep_freed_memory


def _pages_of_second_use(send):
    keep_freed_memory()
    pages = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        held = [torch.ones(2**18) for _ in range(64)]
        pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        del held
    send(pages)


def test_freed_memory_is_kept():
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_pages_of_second_use, args=(sender.send,))
    process.start()
    _, second = receiver.recv()
    process.join()
    # 64 MiB are 16,384 pages of 4 KiB.
    assert second < 5000
