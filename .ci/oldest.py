"""Print pip constraints with the oldest version of every dependency that pyproject.toml allows."""

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
for requirement in project["dependencies"] + project["optional-dependencies"]["cpu"]:
    found = re.match(r"([\w.-]+)>=(\d+)(\.[\d.]+)?", requirement)
    assert found, requirement
    name, major, rest = found.groups()
    print(f"{name}=={major}{rest or '.0'}.*")
