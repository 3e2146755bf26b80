"""What a text encoder gets to see of the prompts: their first tokens, up to its limit."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from rl4med_ddpo.foundation.errors import UserError


def require_distinct(prompts: Sequence[str], tokenizer: Any) -> None:
    """Refuse prompts that the text encoder cannot tell apart; warn of those that it cuts.

    Args:
        prompts: All that a run may ask for, each once.
        tokenizer: The pipeline's.

    Raises:
        UserError: with two prompts whose tokens are the same, up to the encoder's limit.
    """
    limit = tokenizer.model_max_length
    tokens = {prompt: tuple(tokenizer(prompt, verbose=False).input_ids) for prompt in prompts}
    # as the pipeline cuts: the end of the text keeps its place
    seen = {prompt: (*ids[: limit - 1], ids[-1]) for prompt, ids in tokens.items()}
    first: dict[tuple[int, ...], str] = {}
    for prompt, ids in seen.items():
        other = first.setdefault(ids, prompt)
        if other != prompt:
            raise UserError(
                f"two prompts are one to the text encoder, which reads {limit} tokens:\n"
                f"  {other!r} ({len(tokens[other])} tokens)\n"
                f"  {prompt!r} ({len(tokens[prompt])} tokens)\n"
                "  Word them shorter, or so that they differ earlier"
            )
    cut = [prompt for prompt, ids in tokens.items() if len(ids) > limit]
    if cut:
        longest = max(cut, key=lambda prompt: len(tokens[prompt]))
        rank_zero_warn(
            f"the text encoder reads {limit} tokens and does not see the end of {len(cut)} of the "
            f"{len(tokens)} prompts; the longest has {len(tokens[longest])}: {longest!r}"
        )
