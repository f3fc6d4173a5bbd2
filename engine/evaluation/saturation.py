"""How much of a region has to be found: `defects_config.json` of MVTec LOCO, by the grey value of the region's mask.

Where a part is missing, no exact area is anomalous: from its saturation area on, a region counts as found as a whole
(Bergmann et al., Beyond Dents and Scratches, IJCV 2022, equation 1).
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from zsad.engine.images.remote import Location
from zsad.engine.images.stored import read_stored

CONFIG = "defects_config.json"


class Defect(BaseModel):
    """One entry of the file."""

    defect_name: str
    pixel_value: int
    saturation_threshold: float = Field(gt=0, allow_inf_nan=False)  # pixels, or a share of the region
    relative_saturation: bool


Saturation = Mapping[int, Defect]  # by the value of the pixels in the masks

_DEFECTS = TypeAdapter(list[Defect])


def read_saturation(category_root: Path) -> Saturation | None:
    """Read a category's file; None where there is none. Raises ValueError for one that cannot be read."""
    path = category_root / CONFIG
    if not os.path.isfile(path):  # noqa: PTH113 - pathlib raises where a folder may not be entered
        return None
    try:
        defects = _DEFECTS.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())})") from error
    return {defect.pixel_value: defect for defect in defects}


def saturation_area(path: Location, region: NDArray[np.bool_], saturation: Saturation | None) -> float:
    """Return from how many found pixels on a region [H, W], the only one of its file, counts as found as a whole.

    Raises ValueError for a grey value that the configuration does not have, ImageError for an unreadable file.
    """
    area = float(np.count_nonzero(region))
    if saturation is None:
        return area
    values: NDArray[Any] = np.asarray(read_stored(path).values)[region]
    value = int(values.max(initial=0))
    if value not in saturation:
        raise ValueError(f"its mask {path} has the value {value}, which {CONFIG} does not name")
    defect = saturation[value]
    return min(area, defect.saturation_threshold * (area if defect.relative_saturation else 1))
