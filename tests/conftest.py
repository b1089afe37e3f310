"""What holds for all tests: none is judged by how long it takes, as a machine may have other work to do."""

from hypothesis import settings

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
