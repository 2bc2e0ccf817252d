"""The settings: their dataclasses, and reading, checking, describing and writing them."""

from eightgig.config.check import is_safe_name
from eightgig.config.describe import Setting, describe_groups, describe_settings
from eightgig.config.paths import default_cache_dir, expand_home, store_folder
from eightgig.config.read import read_config, setting_groups
from eightgig.config.settings import (
    AUTO,
    DEMO_MODEL,
    Auto,
    Choice,
    Config,
    DataConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from eightgig.config.short import full_setting, text_setting
from eightgig.config.start import starting_values
from eightgig.config.write import example_config, write_config, write_example

__all__ = [
    "AUTO",
    "DEMO_MODEL",
    "Auto",
    "Choice",
    "Config",
    "DataConfig",
    "LoraConfig",
    "MemoryConfig",
    "ModelConfig",
    "RunConfig",
    "Setting",
    "TrainConfig",
    "default_cache_dir",
    "describe_groups",
    "describe_settings",
    "example_config",
    "expand_home",
    "full_setting",
    "is_safe_name",
    "read_config",
    "setting_groups",
    "starting_values",
    "store_folder",
    "text_setting",
    "write_config",
    "write_example",
]
