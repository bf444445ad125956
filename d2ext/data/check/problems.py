"""What a check of a data set finds: problems, and a report that shows them as one table."""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from tabulate import tabulate

from d2ext.errors import UserError

ROWS_PER_KIND = 5


class Problem(NamedTuple):
    """One finding.

    An "error" would crash a training or spoil it silently; after a "warning" the data are used as
    `text` says; "evaluation" is an error in a set that is evaluated on, else a warning.
    `kind` groups equal findings; `image` is a file name, `annotation` an id.
    """

    severity: str
    kind: str
    text: str
    image: str = ""
    annotation: Any = ""

    def line(self) -> str:
        """Subject and text in one line."""
        if self.annotation != "":
            return f"annotation {self.annotation} {self.text}"
        return f"image {self.image} {self.text}" if self.image else self.text


class Finding(NamedTuple):
    """A problem whose image and annotation the caller knows."""

    severity: str
    kind: str
    text: str


@dataclasses.dataclass
class Report:
    """The problems of one data set, whose annotations are in `file`."""

    name: str
    file: str
    problems: list[Problem] = dataclasses.field(default_factory=list)

    def add(self, problems: Iterable[Problem], evaluated: bool) -> None:
        """Add findings; those about evaluation become errors if the set is evaluated on."""
        severity = "error" if evaluated else "warning"
        for p in problems:
            own = p.severity == "evaluation"
            self.problems.append(p._replace(severity=severity) if own else p)

    def of(self, severity: str) -> list[Problem]:
        """The problems of one severity."""
        return [p for p in self.problems if p.severity == severity]

    def summary(self) -> str:
        """`3 errors, 1 warning`."""
        counts = {word: len(self.of(word)) for word in ("error", "warning")}
        return ", ".join(f"{n} {word}{'s' * (n != 1)}" for word, n in counts.items())

    def table(self, rows_per_kind: int = ROWS_PER_KIND) -> str:
        """Errors first; of each kind of problem the first rows and the number of the others.

        Args:
            rows_per_kind: 0 for all.
        """
        totals = Counter((p.severity, p.kind) for p in self.problems)
        shown: Counter = Counter()
        rows = []
        for p in self.of("error") + self.of("warning"):
            key = (p.severity, p.kind)
            shown[key] += 1
            if not rows_per_kind or shown[key] <= rows_per_kind:
                rows.append((p.severity, p.image, p.annotation, p.text))
            if shown[key] == totals[key] > rows_per_kind > 0:
                rows.append(("", "", "", f"... and {totals[key] - rows_per_kind} more like these"))
        head = ("", "image", "annotation", "problem")
        table = tabulate(rows, head, tablefmt="simple", disable_numparse=True)
        return f"{self.name} ({self.file}): {self.summary()}\n{table}"

    def raise_errors(self, hint: str = "") -> None:
        """Raise a one-line `UserError` if there is an error: the first one and how many follow.

        Args:
            hint: what to do about it, appended after a semicolon.
        """
        errors = self.of("error")
        if not errors:
            return
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise UserError(f"{self.file}: {errors[0].line()}{more}" + (f"; {hint}" if hint else ""))
