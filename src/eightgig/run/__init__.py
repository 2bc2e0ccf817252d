"""The run folder: its paths and files, and records to and from JSON."""

from eightgig.run.environment import Environment, describe_environment, installed_versions
from eightgig.run.files import append_json_line, write_atomically, write_json
from eightgig.run.folder import Event, EventKind, Run, check_run, create_run, writing_to
from eightgig.run.links import link_outside, refuse_links
from eightgig.run.log import hide_home, log_to, mask_secrets
from eightgig.run.records import from_json, to_json

__all__ = [
    "Environment",
    "Event",
    "EventKind",
    "Run",
    "append_json_line",
    "check_run",
    "create_run",
    "describe_environment",
    "from_json",
    "hide_home",
    "installed_versions",
    "link_outside",
    "log_to",
    "mask_secrets",
    "refuse_links",
    "to_json",
    "write_atomically",
    "write_json",
    "writing_to",
]
