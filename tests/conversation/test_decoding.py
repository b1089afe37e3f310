"""Settings of generation: the published ones, and overrides by a user."""

from typing import Any

import pytest

from stllm.common.errors import UserError
from stllm.common.registry import templates
from stllm.conversation.decoding import Decoding


def test_published_settings() -> None:
    assert Decoding.published(templates.get("instructblip")) == Decoding(5, 300, repetition_penalty=1.5)
    assert Decoding.published(templates.get("minigpt4")) == Decoding(5, 300, repetition_penalty=1.0)


def test_sampling_and_streaming_default_to_one_beam() -> None:
    assert Decoding().with_options(temperature=0.7).num_beams == 1
    assert Decoding().with_options(stream=True).num_beams == 1
    assert Decoding().with_options(temperature=0.7, num_beams=3).num_beams == 3
    assert Decoding().with_options(temperature=0.0).num_beams == 5


def test_streaming_several_beams_is_refused() -> None:
    with pytest.raises(UserError, match="streaming follows one beam, but 5 were asked for"):
        Decoding().check_streaming()
    with pytest.raises(UserError, match="streaming follows one beam, but 3 were asked for"):
        Decoding().with_options(stream=True, num_beams=3)


@pytest.mark.parametrize(
    "wrong",
    [{"num_beams": 0}, {"num_beams": 65}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"must be at least 1|expected"):
        Decoding().with_options(**wrong)


def test_greedy_decoding_passes_no_sampling_settings() -> None:
    arguments = Decoding(num_beams=1).arguments(eos_token_id=2, pad_token_id=0, stop_strings=["###"])
    config = arguments["generation_config"]
    assert not arguments["logits_processor"]
    assert not config.do_sample
    assert config.temperature in (None, 1.0)
