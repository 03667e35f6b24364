"""The books of the KV blocks balance after every move."""

import random
from array import array

import pytest

from tgi_router.scheduling.block_allocator import BlockAllocator
from tgi_router.scheduling.prefix_cache import ROOT_KEY, block_key


def publish(allocator: BlockAllocator, token_ids: array, block_ids: list[int]) -> None:
    key, size = ROOT_KEY, allocator.block_size
    for index in range(len(token_ids) // size):
        key = block_key(key, token_ids[index * size : (index + 1) * size])
        allocator.publish(key, block_ids[index])


def tokens(*token_ids: int) -> array:
    return array("I", token_ids)


def test_nothing_changes_when_there_is_no_room() -> None:
    allocator = BlockAllocator(num_blocks=3, block_size=2)
    held = allocator.allocate(tokens(1, 2, 3))
    assert held is not None
    assert len(held.block_ids) == 2
    assert allocator.allocate(tokens(5, 6, 7)) is None
    assert allocator.take(2) is None
    assert allocator.num_available == 1
    allocator.check([held.block_ids])


def test_reserve_is_left_over() -> None:
    allocator = BlockAllocator(num_blocks=4, block_size=2)
    assert allocator.allocate(tokens(1, 2, 3, 4), reserve=3) is None
    assert allocator.allocate(tokens(1, 2, 3, 4), reserve=2) is not None


def test_a_published_prefix_is_shared_but_its_last_token_is_always_computed() -> None:
    allocator = BlockAllocator(num_blocks=8, block_size=2)
    first = allocator.allocate(tokens(1, 2, 3, 4))
    assert first is not None
    publish(allocator, tokens(1, 2, 3, 4), list(first.block_ids))
    same = allocator.allocate(tokens(1, 2, 3, 4))
    longer = allocator.allocate(tokens(1, 2, 3, 4, 5))
    other = allocator.allocate(tokens(9, 2, 3, 4, 5))
    assert same is not None
    assert longer is not None
    assert other is not None
    assert (same.num_cached_tokens, longer.num_cached_tokens, other.num_cached_tokens) == (2, 4, 0)
    assert longer.block_ids[:2] == first.block_ids
    allocator.check([first.block_ids, same.block_ids, longer.block_ids, other.block_ids])


def test_blocks_that_follow_a_prefix_are_evicted_before_it() -> None:
    allocator = BlockAllocator(num_blocks=4, block_size=1)
    first = allocator.allocate(tokens(1, 2, 3, 4))
    assert first is not None
    publish(allocator, tokens(1, 2, 3, 4), list(first.block_ids))
    allocator.release(first.block_ids)
    assert allocator.take(2) is not None
    again = allocator.allocate(tokens(1, 2, 9))
    assert again is None  # two blocks are matched, none is left for the third
    again = allocator.allocate(tokens(1, 2))
    assert again is not None
    assert again.num_cached_tokens == 1


def test_a_double_free_is_noticed() -> None:
    allocator = BlockAllocator(num_blocks=4, block_size=1)
    block_ids = allocator.take(2)
    assert block_ids is not None
    allocator.release(block_ids)
    with pytest.raises(AssertionError, match="released twice"):
        allocator.release(block_ids)


@pytest.mark.parametrize("seed", range(20))
def test_random_walk(seed: int) -> None:
    rng = random.Random(seed)
    allocator = BlockAllocator(num_blocks=24, block_size=rng.choice((1, 2, 4)), share_prefixes=seed % 5 != 0)
    held: list[tuple[array, list[int]]] = []
    for _ in range(400):
        move = rng.random()
        if move < 0.45:
            token_ids = tokens(*(rng.randrange(2) for _ in range(rng.randrange(1, 24))))
            allocation = allocator.allocate(token_ids, reserve=rng.randrange(3))
            if allocation is not None:
                assert allocation.num_cached_tokens < len(token_ids)
                held.append((token_ids, list(allocation.block_ids)))
        elif move < 0.6 and held:
            block_ids = allocator.take(rng.randrange(3))
            if block_ids is not None:
                held[rng.randrange(len(held))][1].extend(block_ids)
        elif move < 0.8 and held:
            publish(allocator, *rng.choice(held))
        elif held:
            allocator.release(held.pop(rng.randrange(len(held)))[1])
        allocator.check([block_ids for _, block_ids in held])
    for _, block_ids in held:
        allocator.release(block_ids)
    assert allocator.num_available == allocator.num_blocks


def test_a_distrusted_prefix_is_found_no_more_and_its_blocks_come_back() -> None:
    allocator = BlockAllocator(num_blocks=4, block_size=2)
    prompt = tokens(1, 2, 3, 4, 5)
    first = allocator.allocate(prompt)
    assert first is not None
    publish(allocator, prompt, list(first.block_ids))
    sharer = allocator.allocate(prompt)
    assert sharer is not None
    assert sharer.num_cached_tokens == 4
    allocator.prefix_cache.distrust(prompt, 2)
    allocator.check([first.block_ids, sharer.block_ids])
    allocator.release(first.block_ids)
    allocator.release(sharer.block_ids)
    allocator.check([])
    again = allocator.allocate(prompt)
    assert again is not None
    assert again.num_cached_tokens == 0
    publish(allocator, prompt, list(again.block_ids))
    allocator.release(again.block_ids)
    assert len(allocator.take(4) or ()) == 4  # the old blocks and the new ones
    allocator.check([(0, 1, 2, 3)])
