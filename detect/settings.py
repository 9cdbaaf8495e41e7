"""The settings of a projection in three groups: of the method, of the measure, and of how the mask is drawn."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from detect.measure import MEASURES
from detect.options import OF_FILE
from detect.reconstruct import METHODS, method
from detect.residual import MaskSettings
from detect.scores import SCAN_SCORES


@dataclass(frozen=True)
class Settings:
    """method           of METHODS; reconstruction: its own settings
    measure          of MEASURES; scoring: its own settings
    mask             how the mask is drawn; no score depends on it
    scan_score       of SCAN_SCORES; a calibration holds all of them
    """

    method: str = "inversion"
    reconstruction: Any = None               # method(self.method).Settings(); None: its defaults
    measure: str = "votes"
    scoring: Any = None                      # MEASURES[self.measure].Settings(); None: its defaults
    mask: MaskSettings = field(default_factory=MaskSettings)
    scan_score: str = "mean"

    def __post_init__(self):
        for name, allowed in (("method", METHODS), ("measure", MEASURES), ("scan_score", SCAN_SCORES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, kind in (("reconstruction", method(self.method).Settings),
                           ("scoring", MEASURES[self.measure].Settings)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, kind())
            elif not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name}: expected {kind.__name__}, got {type(getattr(self, name)).__name__}")

    def other_than(self, calibrated: Mapping[str, Any]) -> list[str]:
        """Names of the settings that scores depend on and that differ from a to_json(), such as a calibration's.

        Percentiles mean something only where there are none. Files are compared by the hashes that to_json() holds.
        """
        ours, theirs = self.to_json(), Settings.from_json(calibrated).to_json()
        if choices := [name for name in ("method", "measure") if ours[name] != theirs[name]]:
            return choices
        return [name for group in ("reconstruction", "scoring") for name, value in ours[group].items()
                if value != (theirs[group] | calibrated.get(group, {})).get(name)]

    def to_json(self) -> dict[str, Any]:
        """All settings that a result depends on; those that are not `stored` (memory, paths) are left out.

        Of the files of perceptual=lpips it holds the SHA-256. Raises OSError where one cannot be read.
        """
        groups = {name: stored(getattr(self, name)) for name in ("reconstruction", "scoring", "mask")}
        return {"method": self.method, "reconstruction": groups["reconstruction"], "measure": self.measure,
                "scoring": groups["scoring"], "mask": groups["mask"], "scan_score": self.scan_score}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Settings:
        """The inverse of to_json, except for files, of which that holds hashes alone. Absent settings get defaults.

        Raises ValueError for settings unknown to this version.
        """
        content = dict(content)
        try:
            own = {"reconstruction": method(content.get("method", cls.method)).Settings,
                   "scoring": MEASURES[content.get("measure", cls.measure)].Settings, "mask": MaskSettings}
            said = {name: content.pop(name, {}) for name in own}
            groups = {name: kind(**{key: value for key, value in said[name].items() if not key.endswith(OF_FILE)})
                      for name, kind in own.items()}
            return cls(**groups, **content)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"settings: {error}; made by another version") from error

    def replace(self, **changes: Any) -> Settings:
        """Settings with some values replaced, by name, whatever their group.

        Another method or measure brings its own defaults; the other changes apply on top. Values may be texts, as from
        the command line. Raises ValueError naming what is unknown or does not fit.
        """
        groups = {name: changes.pop(name, getattr(self, name)) for name in ("method", "measure", "scan_score")}
        kept = {"reconstruction": self.reconstruction if groups["method"] == self.method else None,
                "scoring": self.scoring if groups["measure"] == self.measure else None}
        settings = Settings(**groups, **kept, mask=self.mask)
        changed: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
        for name, value in changes.items():
            group = next((g for g in GROUPS if name in names(getattr(settings, g))), None)
            if group is None:
                raise ValueError(f"no setting {name}; there are {', '.join(key for key, _, _ in settings.listing())}")
            changed[group][name] = converted(value, get_type_hints(type(getattr(settings, group)))[name], name)
        # At once: one value may fit only beside another's new one
        return dataclasses.replace(settings, **{group: dataclasses.replace(getattr(settings, group), **values)
                                                for group, values in changed.items()})

    def changed(self, texts: Iterable[str], flag: str = "--set") -> Settings:
        """replace() by texts KEY=VALUE of a flag of the command line. ValueError names the flag."""
        if wrong := [text for text in texts if "=" not in text]:
            raise ValueError(f"{flag} {wrong[0]}: expected KEY=VALUE")
        try:
            return self.replace(**dict(text.split("=", 1) for text in texts))
        except ValueError as error:
            raise ValueError(f"{flag}: {error}") from error

    def listing(self) -> Iterator[tuple[str, Any, str]]:
        """Every setting that may be replaced: name, value, what it is."""
        yield "method", self.method, f"how the closest normal is found: {', '.join(METHODS)}"
        yield "measure", self.measure, f"how unusual a difference is: {', '.join(MEASURES)}"
        yield "scan_score", self.scan_score, f"how slice scores become the scan's score: {', '.join(SCAN_SCORES)}"
        for group in GROUPS:
            for f in dataclasses.fields(getattr(self, group)):
                yield f.name, getattr(getattr(self, group), f.name), f.metadata["help"]


GROUPS = ("reconstruction", "scoring", "mask")


def names(settings: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(settings)}


def stored(settings: Any) -> dict[str, Any]:
    """The fields of a settings dataclass that a result depends on, and hashes of the files that some name."""
    fields = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.metadata["stored"]}
    return fields | (settings.of_files() if hasattr(settings, "of_files") else {})


def converted(value: Any, kind: type, name: str) -> Any:
    """A setting's value, or the text of it, in the type of the setting. ValueError naming the setting."""
    if kind is bool:
        if str(value).lower() not in ("true", "false"):
            raise ValueError(f"{name}: expected true or false, got {value!r}")
        return str(value).lower() == "true"
    try:
        found = os.fspath(value) if kind is str else kind(value)
    except (OverflowError, TypeError, ValueError):
        raise ValueError(f"{name}: expected {kind.__name__}, got {value!r}") from None
    if kind is not str and not math.isfinite(found):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    if isinstance(value, bool) or (isinstance(value, numbers.Real) and found != value):       # 2.5 slices
        raise ValueError(f"{name}: expected {kind.__name__}, got {value!r}")
    return found
