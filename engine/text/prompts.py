"""Prompt sets: states of an object, normal and abnormal, in templates of captions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from zsad.engine.config import ConfigError, Table, check, read_toml

SETS = Path(__file__).parent / "sets"
DEFAULT = "paper22"
OBJECT = "{}"  # where the object goes in a state, and the state in a template

Text = Annotated[str, Field(pattern=r"\S")]
Template = Annotated[str, Field(pattern=r"\{\}")]
LIST = "a list of one or more texts, none of them empty"


@dataclass(frozen=True)
class PromptSet:
    """States and templates, each with `{}` where the object or the state goes."""

    name: str  # of the set, or of the user's file
    normal: tuple[str, ...]
    abnormal: tuple[str, ...]
    templates: tuple[str, ...]
    localising: tuple[str, ...] = ()  # texts for a network that segments by text, without object and template

    def compose(self, object_name: str) -> tuple[list[str], list[str]]:
        """Return the prompts of an object, normal and abnormal: for each state in turn, that state in every template.

        The name is taken as it is, braces included.
        """
        return self._prompts(self.normal, object_name), self._prompts(self.abnormal, object_name)

    def _prompts(self, states: tuple[str, ...], object_name: str) -> list[str]:
        objects = [state.replace(OBJECT, object_name) for state in states]
        return [template.replace(OBJECT, text) for text in objects for template in self.templates]


class PromptTable(Table):
    """A file of prompts."""

    normal: Annotated[tuple[Text, ...], Field(min_length=1)] = Field(description=LIST)
    abnormal: Annotated[tuple[Text, ...], Field(min_length=1)] = Field(description=LIST)
    templates: str | Annotated[tuple[Template, ...], Field(min_length=1)] = Field(
        DEFAULT, description=f"the name of a prompt set, or a list of one or more texts with {OBJECT} in each"
    )
    localising: tuple[Text, ...] = Field((), description="a list of texts, none of them empty")


def set_names() -> list[str]:
    """Return the names of the prompt sets that come with zsad, in alphabetical order."""
    return sorted(path.stem for path in SETS.glob("*.toml"))


def prompt_set(name: str) -> PromptSet:
    """Return a prompt set that comes with zsad; raises ConfigError for an unknown name."""
    if name not in set_names():
        raise ConfigError(f"there is no prompt set {name!r}; choose one of {', '.join(set_names())}")
    return read_prompts(SETS / f"{name}.toml", name)


def read_prompts(path: Path, name: str | None = None) -> PromptSet:
    """Return the prompts of a TOML file; raises ConfigError that names the file and the key.

    Keys: `normal` and `abnormal`, the states; a state without `{}` does not name the object. `templates`, or the name
    of the set whose templates are taken (paper22 by default); `["{}"]` takes the states as they are. `localising`.
    """
    values = read_toml(path)
    try:
        table = check(PromptTable, values)
        templates = prompt_set(table.templates).templates if isinstance(table.templates, str) else table.templates
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return PromptSet(name or path.name, table.normal, table.abnormal, templates, table.localising)
