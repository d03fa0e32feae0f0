"""Whose folder it is: a run and a comparison each take one for themselves."""

from __future__ import annotations

from pathlib import Path

from megatron_cpt.config.manifest import read_json, write_json_atomic, write_text_atomic
from megatron_cpt.errors import ConfigError

RECORD = "run.json"


def refuse_foreign(root: Path) -> None:
    """Refuse a folder with something in it that no run put there.

    Raises:
        ConfigError: it is a file, or holds other things.
    """
    if root.exists() and not root.is_dir():
        raise ConfigError(f"{root} is a file; give --set output=FOLDER")
    held = {path.name for path in root.iterdir()} - {".lock"} if root.exists() else set()
    if held and RECORD not in held:
        raise ConfigError(
            f"{root} is not empty ({', '.join(sorted(held)[:3])}) and holds no run; give --set output=FOLDER"
        )


def claim(root: Path, name: str, identity: str, settings: str, has_begun: bool) -> None:
    """Take a folder, or refuse one that holds another run.

    Args:
        root: the folder.
        name: of the run.
        identity: a hash of all that may not change once something is made.
        settings: the configuration as YAML, which is kept beside the record.
        has_begun: something was made here; until then a run may be corrected.

    Raises:
        ConfigError: something was made here under another identity.
    """
    record = root / RECORD
    if record.exists() and has_begun:
        held = read_json(record, ConfigError)
        if held.get("identity") != identity:
            raise ConfigError(
                f"{root} holds another run ({held.get('name')}, identity {str(held.get('identity'))[:12]}..., "
                f"now {identity[:12]}...); give --set output=FOLDER, or take the settings of {root / 'config.yaml'}"
            )
    write_text_atomic(root / "config.yaml", settings)
    write_json_atomic(record, {"name": name, "identity": identity})
