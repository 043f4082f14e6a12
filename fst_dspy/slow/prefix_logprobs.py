"""TRL's fused output layer after common beginnings: an optimizer step's half of ``prefixes``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fst_dspy.model.cache_layers import cache_name
from fst_dspy.model.prefixes import Prefixes, positions, read_prefixes, right_padded


def fused_from_prefixes(
    model: Any,
    backbone: Any,
    prefixes: Prefixes,
    rows: Sequence[tuple[list[int], list[int]]],
    label_BT: Tensor,
    pad_id: int,
) -> Any:
    """Log-probabilities and entropies of completions, beginnings run once, forward and backward.

    Args:
        model: With TRL's forward (``fused_lm_head``).
        backbone: The model without its output layer, which that forward calls.
        prefixes: Of the rows' prompts.
        rows: Prompt and completion of each row, without padding.
        label_BT: The completions, padded on the right with -100.

    Returns:
        TRL's output, with ``log_probs`` and ``entropy`` of shape B x T.
    """
    device = label_BT.device
    rest_B = [prefixes.rest(row, prompt) for row, (prompt, _) in enumerate(rows)]
    own_ids, own_mask = right_padded(
        [(*rest, *completion) for rest, (_, completion) in zip(rest_B, rows, strict=True)],
        pad_id,
        device,
    )
    # The logits of a token are those of the position before it.
    first_B1 = torch.tensor([[len(rest) - 1] for rest in rest_B], device=device)
    at_BT = first_B1 + torch.arange(label_BT.shape[1], device=device)[None]
    at_BT1 = at_BT.clamp(max=own_ids.shape[1] - 1)[..., None]

    def completion_positions(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden_BTD = output.last_hidden_state
        at_BTD = at_BT1.expand(-1, -1, hidden_BTD.shape[-1])
        output.last_hidden_state = hidden_BTD.gather(1, at_BTD)
        return output

    cache, mask_BT = read_prefixes(backbone, prefixes, pad_id, device)
    mask_BT = torch.cat([mask_BT, own_mask], dim=1)
    handle = backbone.register_forward_hook(completion_positions)
    try:
        return model(
            input_ids=own_ids,
            attention_mask=mask_BT,
            position_ids=positions(mask_BT)[:, -own_ids.shape[1] :],
            **{cache_name(model): cache},
            shift_labels=label_BT,
            fused_lm_head=True,
        )
    finally:
        handle.remove()
