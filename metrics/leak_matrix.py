"""Which attributes leak into samples of prompts that do not ask for them, from a manifest alone."""

import numpy as np
import pandas as pd

from rl4med_ddpo.datamodules.vocabulary import Vocabulary
from rl4med_ddpo.metrics.alignment import judged, prompt_numbers, reader_of_all, readings


def leak_matrix(manifest: pd.DataFrame, vocabulary: Vocabulary) -> pd.DataFrame:
    """Return the share of each prompt's samples that show each attribute, `(P, A)`.

    The judge reads them; those of `one_of` the reward network, for which the images were optimised,
    if the judge cannot. Where a prompt asks for an attribute the share should be 1, elsewhere 0:
    what is there leaked in. NaN where there is no sample or no reader.
    """
    several, ones = list(vocabulary.any_of), list(vocabulary.one_of)
    shown = pd.DataFrame(np.nan, index=manifest.index, columns=several + ones)
    shown[several] = judged(manifest, vocabulary).astype(float)
    reader = reader_of_all(manifest, vocabulary)
    of_all = readings(manifest, reader, vocabulary) if reader else None
    if of_all is not None and ones:
        shown[ones] = of_all[:, len(several) :].astype(float)
    numbers = prompt_numbers(manifest, vocabulary)
    by_prompt = shown.groupby(numbers).mean().reindex(range(len(vocabulary.keys)))
    return by_prompt.set_axis(vocabulary.names).rename_axis("prompt")
