import pytest

from rl4med_ddpo.base_pipeline.build import build_tokenizer
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules.diffusion.prompt_tokens import require_distinct
from support.command_line import ddpo, fine_tuning, in_process
from support.dermoscopy import PROMPTS

LONG = "--data.vocabulary.template=an image of our own dermoscope, {one_of} {any_of}"


@pytest.mark.parametrize("stage", ["sd", "ddpo"])
def test_prompts_that_the_text_encoder_cuts_to_the_same_are_refused(
    stage, tiny_pipeline, tiny_classifiers, isic, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    commands = {
        "sd": fine_tuning(tmp_path, tiny_pipeline, isic, LONG),
        "ddpo": ddpo(tmp_path, tiny_pipeline, tiny_classifiers, LONG, "--data.prompts=balanced",
                     "--data.samples_per_epoch=64"),
    }  # fmt: skip
    with pytest.raises(UserError, match=r"two prompts are one to the text encoder.* 20 tokens"):
        in_process(*commands[stage])
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_cut_prompt_is_named_with_its_length():
    tokenizer = build_tokenizer(max_length=16)
    with pytest.warns(UserWarning, match=r"reads 16 tokens .* of 2 of the 3 prompts.* has 20: "):
        require_distinct([PROMPTS[0], PROMPTS[15], PROMPTS[31]], tokenizer)


def test_the_prompts_of_the_paper_are_told_apart(recwarn):
    require_distinct(PROMPTS, build_tokenizer())
    assert not recwarn.list


def test_the_same_words_in_two_prompts_are_told_with_both():
    with pytest.raises(UserError) as error:
        require_distinct(["ink and hair", "Ink  and hair"], build_tokenizer(max_length=77))
    for part in ("'ink and hair' (", "'Ink  and hair' ("):
        assert part in str(error.value)
