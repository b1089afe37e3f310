"""Settings for all tests, and a small toy world to train on."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("unhurried", deadline=None)  # a machine may have other work to do
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small toy world, made once."""
    from stllm.toy.world import LLAMA, write_world

    folder = tmp_path_factory.mktemp("toy") / "world"
    with pytest.MonkeyPatch.context() as patch:  # less sharp than the recipes': two runs' rounding stays rounding
        patch.setitem(LLAMA, "initializer_range", 0.07)
        write_world(folder, num_train=36, num_test=4, seed=3)
    return folder
