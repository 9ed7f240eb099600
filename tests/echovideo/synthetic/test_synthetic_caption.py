from __future__ import annotations

import pytest

from echovideo.errors import RequestError
from echovideo.synthetic.caption import OMITTED_SHARE, caption, read_caption
from echovideo.synthetic.clip import ATTRIBUTES, sample_conditions


def test_caption_that_omits_nothing_reads_back_to_all_attributes() -> None:
    for seed, condition in enumerate(sample_conditions(range(500))):
        assert read_caption(caption(condition, seed=seed, omitted_share=0)) == condition.attributes()


def test_caption_reads_back_to_a_part_of_the_attributes_and_omits_the_share_it_should() -> None:
    stated = 0
    for seed, condition in enumerate(sample_conditions(range(500))):
        attributes = read_caption(caption(condition, seed=seed))
        assert attributes.items() <= condition.attributes().items()
        stated += len(attributes)
    assert abs(stated / (500 * len(ATTRIBUTES)) - (1 - OMITTED_SHARE)) < 0.02


def test_caption_without_any_attribute_reads_back_to_none() -> None:
    text = caption(sample_conditions([1])[0], seed=1, omitted_share=1)
    assert text == "A person."
    assert read_caption(text) == {}


def test_caption_wording_varies_with_the_seed_and_repeats_with_it() -> None:
    condition = sample_conditions([7])[0]
    assert caption(condition, seed=1) == caption(condition, seed=1)
    assert len({caption(condition, seed=seed, omitted_share=0) for seed in range(50)}) > 40


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("A dog nodding.", "does not begin with 'A person'"),
        ("A person nodding", "end with a full stop"),
        ("A person nodding, wearing a hat.", "no attribute is worded 'wearing a hat'"),
        ("A person nodding, talking.", "states motion twice"),
    ],
)
def test_text_outside_the_grammar_is_refused_with_the_words_that_do_not_fit(text: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        read_caption(text)
