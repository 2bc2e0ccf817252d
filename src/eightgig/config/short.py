"""Settings as people write them on the command line: without their group, lists without brackets.

`--sweep max_length=1024,2048` and `--compare offload=none,down_proj+o_proj` take these; what comes
out is what `--set` takes.
"""

from __future__ import annotations

import json

from eightgig.config.read import setting_groups
from eightgig.errors import ConfigError

_LISTS = ("memory.offload", "lora.target_modules")
_WORDS = ("auto", "all-linear")


def full_setting(text: str) -> str:
    """`r=16` as `lora.r=16`, `offload=a+b` as `memory.offload=[a, b]`, `offload=none` as `=[]`.

    Raises:
        ConfigError: There is no such setting.
    """
    name, has_value, value = text.partition("=")
    setting = find_setting(name.strip())
    if setting in _LISTS and not value.startswith("[") and value not in _WORDS:
        parts = [] if value == "none" else value.split("+")
        value = f"[{', '.join(parts)}]"
    return f"{setting}{has_value}{value}"


def text_setting(setting: str, text: str) -> str:
    """`setting=text` for a text of any characters, which YAML would take for its own: `a #1`."""
    return f"{setting}={json.dumps(text, ensure_ascii=False)}"


def find_setting(key: str) -> str:
    """`max_length` as `data.max_length`, where one group alone has it.

    Raises:
        ConfigError: There is no such setting, or several.
    """
    group, _, name = key.rpartition(".")
    holders = [
        each for each, names in setting_groups().items() if name in names and group in ("", each)
    ]
    if len(holders) != 1:
        found = ", ".join(f"{each}.{name}" for each in holders)
        raise ConfigError(
            f'"{key}" is not the name of one setting.',
            why=f"There are several: {found}." if holders else "No group has it.",
            fix='Write the group too, for example "data.max_length" or "lora.r".',
        )
    return f"{holders[0]}.{name}"
