"""How many prompt tokens a step may process: less after one ran out of memory, more again with time."""

MIN_PROMPT_TOKENS = 16  # in any step: below it, memory is not what prompts take
STEPS_TO_GROW = 512


class PromptBudget:
    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = max_tokens  # now
        self._num_good_steps = 0  # since it last changed

    def halve(self) -> bool:
        """A step ran out of memory. False: there is nothing left to halve."""
        self._num_good_steps = 0
        halved = max(self.num_tokens // 2, min(MIN_PROMPT_TOKENS, self.max_tokens))
        has_changed, self.num_tokens = halved < self.num_tokens, halved
        return has_changed

    def stepped(self) -> None:
        """A step went well."""
        if self.num_tokens < self.max_tokens:
            self._num_good_steps += 1
            if self._num_good_steps == STEPS_TO_GROW:
                self._num_good_steps = 0
                self.num_tokens = min(2 * self.num_tokens, self.max_tokens)
