"""The paper's vocabulary, by short names."""

from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY

ARTIFACTS, DISEASES, ATTRIBUTES = DERMOSCOPY.any_of, DERMOSCOPY.one_of, DERMOSCOPY.attributes
CONDITIONS, PROMPTS, WORDS = DERMOSCOPY.conditions, DERMOSCOPY.prompts, DERMOSCOPY.words
condition_of, prompt_of = DERMOSCOPY.condition_of, DERMOSCOPY.prompt_of
prompt_id, short_name = DERMOSCOPY.prompt_id, DERMOSCOPY.short_name
