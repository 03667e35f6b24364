"""Steps that run out of memory make prompt chunks shorter, for a while."""

import pytest

from tgi_router.scheduling.prompt_budget import MIN_PROMPT_TOKENS, STEPS_TO_GROW, PromptBudget


def test_it_halves_down_to_a_floor_and_grows_back() -> None:
    budget = PromptBudget(100)
    sizes = []
    while budget.halve():
        sizes.append(budget.num_tokens)
    assert sizes == [50, 25, MIN_PROMPT_TOKENS]
    for _ in range(3 * STEPS_TO_GROW - 1):
        budget.stepped()
    assert budget.num_tokens == 4 * MIN_PROMPT_TOKENS
    budget.stepped()
    assert budget.num_tokens == 100


@pytest.mark.parametrize("max_tokens", [1, MIN_PROMPT_TOKENS])
def test_what_is_at_the_floor_already_has_nothing_to_halve(max_tokens: int) -> None:
    budget = PromptBudget(max_tokens)
    assert not budget.halve()
    assert budget.num_tokens == max_tokens
