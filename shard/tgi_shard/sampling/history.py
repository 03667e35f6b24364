"""What the sequences of a step have said so far, prompt and output, for the penalties and the watermark."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class History:
    """One row a sequence that samples in this step."""

    token_ids: Tensor  # [number of slots, width] int32, on the device: the tokens of all slots
    slots: np.ndarray  # [n]: where in it each row's tokens stand
    num_tokens: np.ndarray  # [n]: how many they are, at least 1
    prompt_lens: np.ndarray  # [n]: how many of those are the prompt's
    num_unsaid: (
        np.ndarray
    )  # [n]: of the prompt's first ones, how many count for nothing: an encoder read them

    @property
    def num_outputs(self) -> np.ndarray:
        return self.num_tokens - self.prompt_lens

    def select(self, rows: np.ndarray) -> "History":
        return History(
            self.token_ids,
            self.slots[rows],
            self.num_tokens[rows],
            self.prompt_lens[rows],
            self.num_unsaid[rows],
        )

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids [n, longest] int64, which of them are real, and which are output: [n, longest] bool.

        What is not real is filled with the row's own newest token: padding must never make a token seen that
        was not.
        """
        device = self.token_ids.device
        slots, num_tokens, prompt_lens, num_unsaid = torch.from_numpy(
            np.stack((self.slots, self.num_tokens, self.prompt_lens, self.num_unsaid))
        ).to(device)
        columns = torch.arange(int(self.num_tokens.max()), device=device)
        ids = self.token_ids[:, : len(columns)].index_select(0, slots).long()
        is_real = (columns < num_tokens.unsqueeze(1)) & (columns >= num_unsaid.unsqueeze(1))
        is_output = is_real & (columns >= prompt_lens.unsqueeze(1))
        newest = ids.gather(1, num_tokens.unsqueeze(1) - 1)
        return torch.where(is_real, ids, newest), is_real, is_output

    def last_token_ids(self) -> list[int]:
        """Each row's newest token, on the host: waits for the device."""
        index = torch.from_numpy(np.stack((self.slots, self.num_tokens - 1))).to(self.token_ids.device)
        return self.token_ids[index[0], index[1]].tolist()
