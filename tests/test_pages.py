"""Large blocks: kept for the next, never handed out while anybody reads them."""

import mmap
import threading

import pytest
import torch

from meml_lib.rollouts import cpu, pages
from meml_lib.training import head


@pytest.fixture(autouse=True)
def few_bytes(monkeypatch):
    monkeypatch.setattr(pages, "LEAST_BYTES", 8)
    pages._free.cache_clear()
    yield
    pages._free.cache_clear()


def test_it_is_an_empty_tensor():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = pages.empty((3, 2, 5), dtype)
        assert x.shape == (3, 2, 5) and x.dtype == dtype and x.is_contiguous() and x.device.type == "cpu"
        x.copy_(torch.arange(30.0).view(3, 2, 5))
        assert x.sum() == 435 and not x.untyped_storage().resizable()  # so the heap did not give it
    assert pages.empty((7, 0), torch.float32).shape == (7, 0)


def test_small_blocks_come_from_the_heap():
    assert pages.empty((1,), torch.float32).untyped_storage().resizable()
    assert not pages.empty((2,), torch.float32).untyped_storage().resizable()


def test_what_is_let_go_is_handed_on_and_what_is_read_is_not():
    first, second = (pages.empty((1000,), torch.float32) for _ in range(2))
    places = first.data_ptr(), second.data_ptr()
    part = first[3:5]  # holds on to all of it
    del first
    third = pages.empty((1000,), torch.float32)
    assert third.data_ptr() not in places
    del part
    fourth = pages.empty((20, 55), torch.bfloat16)  # of more than half its size
    assert fourth.data_ptr() == places[0]
    assert len({x.data_ptr() for x in (second, third, fourth)}) == 3


def test_a_block_serves_what_needs_more_than_half_of_it():
    place = pages.empty((2048,), torch.uint8).data_ptr()
    for size in (1025, 1500, 2048):
        assert pages.empty((size,), torch.uint8).data_ptr() == place
    held = pages.empty((1024,), torch.uint8), pages.empty((2049,), torch.uint8)
    assert place not in [x.data_ptr() for x in held] and pages.empty((2000,), torch.uint8).data_ptr() == place


def test_of_each_size_so_much_is_kept_and_one_at_least(monkeypatch):
    monkeypatch.setattr(pages, "KEPT_BYTES", 4096)
    for size, kept in ((1024, 4), (4096, 1), (8192, 1)):
        blocks = [pages.empty((size,), torch.uint8) for _ in range(6)]
        blocks.clear()
        assert len(pages._free(size)) == kept


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


@pytest.mark.parametrize("bias", [None, torch.arange(40.0)])
def test_a_product_does_not_read_what_its_block_held(bias):
    a, b = torch.randn(30, 7), torch.randn(7, 40)
    place = pages.empty((30, 40), torch.float32).fill_(torch.nan).data_ptr()
    found = head._product(a, b, bias)
    assert found.data_ptr() == place and not found.isnan().any()
    torch.testing.assert_close(found, a @ b + (0.0 if bias is None else bias))


def test_nor_does_a_matrix_in_tiles():
    if not cpu.multiplies(torch.bfloat16):
        pytest.skip("the processor does not multiply bfloat16, or the compiler does not know how")
    weight, x = torch.randn(33, 33).bfloat16(), torch.randn(3, 33)
    wanted = cpu.TileProduct(weight, None, None, gated=False)(x)
    place = pages.empty((2, 2, 2, 16, 16, 2), torch.bfloat16).fill_(torch.nan).data_ptr()
    product = cpu.TileProduct(weight, None, None, gated=False)
    assert product.places[0] == place and product(x).equal(wanted) and not wanted.isnan().any()
