"""The place of a data set's settings in earlier versions; they are in stllm/common/schema.py."""

from stllm.common.schema import DatasetSettings

__all__ = ["DatasetSettings"]
