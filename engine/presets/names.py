"""The presets that come with zsad, one TOML file each."""

from pathlib import Path

PRESETS = Path(__file__).parent


def preset_names() -> list[str]:
    """Return their names, in alphabetical order."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))
