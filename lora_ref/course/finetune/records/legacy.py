"""Records and run directories of the former format, lora_ref.finetune/1, in today's names.

Format 1 had flat settings, and called the learning rate `rate` and the adapters that train at once `together`.
"""

from collections.abc import Mapping

from ..settings import RENAMED, nest
from .schema import FORMAT

FORMER_FORMAT = "lora_ref.finetune/1"
RENAMED_IN_RUNS = {"rate": "lr", "together": "parallel_adapters"}


def upgrade_record(record: Mapping) -> Mapping:
    """A record in today's format; one that is in it, or in none that is known, is returned as it is."""
    if record.get("format") != FORMER_FORMAT:
        return record
    return {
        **record,
        "format": FORMAT,
        "settings": upgrade_settings(record.get("settings")),
        **{name: [upgrade_run(run) for run in record[name]] for name in ("runs", "diverged") if name in record},
    }


def upgrade_run(run: object) -> object:
    """A run in today's names: of a record, or of a file in a run directory."""
    if not isinstance(run, Mapping):
        return run
    return {RENAMED_IN_RUNS.get(name, name): value for name, value in run.items()}


def upgrade_settings(settings: object) -> object:
    """Flat settings, in former or in today's names, as a profile's groups; what is no flat settings is unchanged.

    Raises:
        ValueError: a name that no setting has or had.
    """
    if not isinstance(settings, Mapping) or any(isinstance(value, Mapping) for value in settings.values()):
        return settings
    return nest({RENAMED.get(name, name): value for name, value in settings.items()})
