import pytest

from eightgig.config import full_setting
from eightgig.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("max_length=1024", "data.max_length=1024"),
        ("lora.r=8", "lora.r=8"),
        ("r=8", "lora.r=8"),
        ("budget=6.75GiB", "memory.budget=6.75GiB"),
        ("offload=none", "memory.offload=[]"),
        ("offload=auto", "memory.offload=auto"),
        ("offload=down_proj+o_proj", "memory.offload=[down_proj, o_proj]"),
        ("offload=[down_proj]", "memory.offload=[down_proj]"),
        ("target_modules=all-linear", "lora.target_modules=all-linear"),
        ("target_modules=q_proj", "lora.target_modules=[q_proj]"),
    ],
)
def test_short_words_become_settings(text: str, full: str) -> None:
    assert full_setting(text) == full


@pytest.mark.parametrize("key", ["max_lenght", "lora.max_length", "nothing.r", ""])
def test_a_name_that_is_no_setting_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="not the name of one setting"):
        full_setting(f"{key}=1")


def test_a_name_that_two_groups_have_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        full_setting("name=x")
    assert error.value.why == "There are several: model.name, run.name."
