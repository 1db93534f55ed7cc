"""Large blocks: kept for the next, never handed out while anybody reads them."""

import mmap
import threading

import pytest
import torch

from meml_lib.rollouts import pages


@pytest.fixture(autouse=True)
def few_bytes(monkeypatch):
    monkeypatch.setattr(pages, "LEAST_BYTES", 8)
    monkeypatch.setattr(pages, "_free", [])


def test_it_is_an_empty_tensor():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = pages.empty((3, 2, 5), dtype)
        assert x.shape == (3, 2, 5) and x.dtype == dtype and x.is_contiguous() and x.device.type == "cpu"
        x.copy_(torch.arange(30.0).view(3, 2, 5))
        assert x.sum() == 435 and not x.untyped_storage().resizable()  # so the heap did not give it
    assert pages.empty((7, 0), torch.float32).shape == (7, 0)


def test_small_blocks_come_from_the_heap(monkeypatch):
    monkeypatch.setattr(pages, "LEAST_BYTES", 9)
    assert pages.empty((2,), torch.float32).untyped_storage().resizable()
    assert not pages.empty((3,), torch.float32).untyped_storage().resizable()
    assert pages.LEAST_BYTES == 9 and len(pages._free) == 1


def test_what_is_let_go_is_handed_on_and_what_is_read_is_not():
    first, second = (pages.empty((1000,), torch.float32) for _ in range(2))
    places = first.data_ptr(), second.data_ptr()
    part = first[3:5]  # holds on to all of it
    del first
    third = pages.empty((1000,), torch.float32)
    assert third.data_ptr() not in places
    del part
    fourth = pages.empty((10, 50), torch.bfloat16)
    assert fourth.data_ptr() == places[0]
    assert len({x.data_ptr() for x in (second, third, fourth)}) == 3


def test_the_least_block_that_is_large_enough_is_taken_and_one_that_is_too_small_replaced():
    sizes = (5000, 2000, 3000)
    blocks = {size: pages.empty((size,), torch.uint8) for size in sizes}
    place = {size: block.data_ptr() for size, block in blocks.items()}
    blocks.clear()
    medium = pages.empty((2001,), torch.uint8)
    assert medium.data_ptr() == place[3000]
    large = pages.empty((6000,), torch.uint8)  # the largest free block is given back
    assert [len(block) for block in pages._free] == [2000]
    del medium, large
    assert sorted(map(len, pages._free)) == [2000, 3000, 6000]


def test_a_block_may_be_let_go_in_another_thread():
    held = [pages.empty((1000,), torch.float32)]
    place = held[0].data_ptr()
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert pages.empty((1000,), torch.float32).data_ptr() == place


@pytest.mark.parametrize("error", [None, OSError])
def test_a_system_may_have_no_huge_pages(error, monkeypatch):
    class Pages(mmap.mmap):
        def madvise(self, *_):
            raise error("not known")

    monkeypatch.setattr(pages.mmap, "mmap", Pages)
    if error is None:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert pages.empty((100,), torch.float32).zero_().sum() == 0
