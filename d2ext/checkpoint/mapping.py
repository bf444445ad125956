"""Renaming the weights of other programs: rules from our names to theirs, applied to every
parameter of a model, with an account of each tensor on either side."""

import dataclasses
import functools
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from d2ext.errors import UserError

Shape = tuple[int, ...]
# Never loaded: counters without meaning to fixed statistics, and constants made from the config.
_NOT_LOADED = re.compile(r"(.*\.num_batches_tracked|pixel_mean|pixel_std|.*cell_anchors\.\d+)")
_FIELD = re.compile(r"\{(\w+)(?::([\w*]+)|([+-]\d+))?\}")
_CLASSES = {None: r"\d+", "w": r"\w+", "*": r".*"}
_FORMS: dict[str | None, Callable[[str], str]] = {
    None: str,
    # Layers of a block, and blocks of a stage, as Caffe counts them: a, b, c (from 1 or from 0),
    # or a, b1, b2, ...
    "abc": lambda x: chr(ord("a") + int(x) - 1),
    "letter": lambda x: chr(ord("a") + int(x)) if int(x) < 26 else "?",
    "count": lambda x: f"b{x}" if int(x) else "a",
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one kind of parameter is called elsewhere.

    Attributes:
        target: pattern of our names. `{n}` stands for a number, `{p:w}` for a word, `{x:*}`
            for anything.
        sources: alternative names in the file, the first present one is taken; each is a template
            with the fields of `target` (`{n-1}` is one less, `{n:letter}` a letter), or a
            tuple of them for a `transform` of several tensors. A name that ends in "?" may be
            absent: the transform gets None.
        transform: from the tensors in the file to ours; None renames only.
        per_class: the shape depends on the number of classes, so that it may differ when a network
            is fine-tuned.
        label: what the transform does, for the table.
    """

    target: str
    sources: str | Sequence[str | tuple[str, ...]]
    transform: Callable[..., Tensor] | None = None
    per_class: bool = False
    label: str = ""

    def match(self, name: str) -> dict[str, str] | None:
        """The values of the fields in one of our names; None if it is another kind."""
        found = _pattern(self.target).fullmatch(name)
        return found.groupdict() if found else None

    def alternatives(self, fields: Mapping[str, str]) -> list[tuple[str, ...]]:
        """The names in the file for the given fields, in order of preference."""
        sources = [self.sources] if isinstance(self.sources, str) else self.sources
        groups = [(x,) if isinstance(x, str) else tuple(x) for x in sources]
        return [tuple(_fill(name, fields) for name in group) for group in groups]


@functools.cache
def _pattern(template: str) -> "re.Pattern":
    parts, end = [], 0
    for field in _FIELD.finditer(template):
        parts.append(re.escape(template[end : field.start()]))
        parts.append(f"(?P<{field[1]}>{_CLASSES[field[2]]})")
        end = field.end()
    return re.compile("".join(parts) + re.escape(template[end:]))


def _fill(template: str, fields: Mapping[str, str]) -> str:
    def value(field: "re.Match") -> str:
        text = fields[field[1]]
        return str(int(text) + int(field[3])) if field[3] else _FORMS[field[2]](text)

    return _FIELD.sub(value, template)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of the account.

    Attributes:
        target, source: our name and the one in the file; "" if there is none.
        shape: of our parameter, or of the tensor that is not used.
        status: "used", "reshaped", "missing", "unused", "conflict" or "kept" (the model's own).
        note: what was done, or why not.
    """

    target: str
    source: str
    shape: Shape
    status: str
    note: str = ""


@dataclasses.dataclass
class Conversion:
    """The result of `convert_weights`: the weights that fit, and what became of the others.

    Attributes:
        weights: by our names.
        entries: one per parameter of the model, then one per tensor of the file without a use.
        title: of the kind of file, e.g. "MMDetection".
        settings: see `d2ext.checkpoint.settings`.
        notes: one line each about what the model computes otherwise than the original.
        metadata: what else to store beside the weights.
        class_dependent: our names whose shape depends on the number of classes.
    """

    weights: dict[str, Tensor]
    entries: list[Entry]
    title: str = ""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    class_dependent: list[str] = dataclasses.field(default_factory=list)

    def having(self, *statuses: str) -> list[Entry]:
        """The entries with one of the given statuses."""
        return [entry for entry in self.entries if entry.status in statuses]

    def unexplained(self) -> list[Entry]:
        """Tensors without a use and without a reason for that."""
        return [entry for entry in self.having("unused") if not entry.note]

    def table(self, every: bool = True) -> str:
        """The account as text: a line per tensor, then the totals.

        Args:
            every: False leaves out those that were simply renamed.
        """
        hidden = () if every else ("used", "kept")
        rows = [("in the model", "in the file", "shape", "status")]
        for entry in self.entries:
            if entry.status not in hidden:
                shape = "x".join(map(str, entry.shape)) or "scalar"
                status = f"{entry.status}: {entry.note}" if entry.note else entry.status
                rows.append((entry.target or "-", entry.source or "-", shape, status))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join(x.ljust(w) for x, w in zip(row, (*widths, 0))).rstrip() for row in rows]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """The totals in one line."""
        counts = {}
        for entry in self.entries:
            counts[entry.status] = counts.get(entry.status, 0) + 1
        order = ("used", "reshaped", "unused", "missing", "conflict", "kept")
        return f"{self.title}: " + ", ".join(f"{counts[x]} {x}" for x in order if x in counts)

    def check(self, path: str, partial: bool = False, other_classes: bool = False) -> None:
        """Raise a `UserError` unless everything has a place.

        Args:
            path: of the file, for the message.
            partial: missing and unused tensors are fine.
            other_classes: so are other numbers of classes.
        """
        conflicts = self.having("conflict")
        if other_classes:
            conflicts = [x for x in conflicts if x.target not in self.class_dependent]
        for entries, text, fatal in (
            (conflicts, "have another shape than the model's", True),
            (self.having("missing"), "of the model are not in it", not partial),
            (self.unexplained(), "in it have no place in the model", not partial),
        ):
            if entries and fatal:
                first = entries[0]
                names = f"'{first.source or first.target}'"
                if first.status == "conflict":
                    names += f" ({first.note})"
                raise UserError(
                    f"checkpoint '{path}' ({self.title}): {len(entries)} tensors {text}, e.g. "
                    f"{names}; tools/convert_checkpoint.py --in FILE shows them all"
                    + ("" if first.status == "conflict" else " and with --partial takes the rest")
                )


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Shapes of what is loaded into a model, by name."""
    return {k: tuple(v.shape) for k, v in state.items() if not _NOT_LOADED.fullmatch(k)}


def _find(
    name: str, rules: Sequence[Rule], weights: Container[str]
) -> tuple[Rule | None, tuple[str, ...], tuple[str, ...]]:
    """The rule of a parameter, its names in the file (none if absent) and the one to report."""
    for rule in rules:
        fields = rule.match(name)
        if fields is None:
            continue
        alternatives = rule.alternatives(fields)
        for group in alternatives:
            required = [x for x in group if not x.endswith("?")]
            if all(x in weights for x in required):
                return rule, group, group
        return rule, (), alternatives[0]
    return None, (), ()


def used_names(
    names: Iterable[str], shapes: Mapping[str, Shape], rules: Sequence[Rule]
) -> tuple[int, int]:
    """How many of a file's names, and of a model's, the rules bring together."""
    names, used, filled = set(names), set(), 0
    for name in shapes:
        _, group, _ = _find(name, rules, names)
        used.update(x for x in group if x in names)
        filled += bool(group)
    return len(used), filled


def convert_weights(
    shapes: Mapping[str, Shape],
    weights: Mapping[str, Tensor],
    rules: Sequence[Rule],
    unused: Sequence[tuple[str, str]] = (),
    partial: bool = False,
) -> Conversion:
    """Bring the weights of a file under the names of a model.

    Args:
        shapes: of the model's parameters, see `shapes_of`.
        weights: of the file.
        rules: the first one whose target fits a parameter counts.
        unused: (regular expression, reason) of tensors in the file that have no use.
        partial: parameters without a rule keep their values; otherwise they are missing.
    """
    result, entries, used, class_dependent = {}, [], set(), []
    for name, shape in shapes.items():
        rule, group, wanted = _find(name, rules, weights)
        if rule is not None and rule.per_class:
            class_dependent.append(name)
        if not group:
            status = "kept" if partial and rule is None else "missing"
            source = wanted[0].rstrip("?") if wanted else ""
            entries.append(Entry(name, source, shape, status))
            continue
        members = [x.rstrip("?") for x in group]
        used.update(x for x in members if x in weights)
        source = members[0]
        assert rule is not None  # a group has been found by a rule
        value = _transformed(rule, [weights.get(x) for x in members], source)
        note = rule.label
        if tuple(value.shape) == shape:
            status = "used"
        elif _without_ones(value.shape) == _without_ones(shape) and value.numel():
            status, note = "reshaped", f"from {'x'.join(map(str, value.shape))}"
            value = value.reshape(shape)
        else:
            status = "conflict"
            note = f"{tuple(value.shape)} in the file, {tuple(shape)} in the model"
        if status != "conflict":
            result[name] = value
        entries.append(Entry(name, source, shape, status, note))
    for name, value in weights.items():
        if name not in used:
            reasons = [reason for pattern, reason in unused if re.fullmatch(pattern, name)]
            entries.append(Entry("", name, tuple(value.shape), "unused", "".join(reasons[:1])))
    return Conversion(result, entries, class_dependent=class_dependent)


def _transformed(rule: Rule, values: list[Any], source: str) -> Tensor:
    if rule.transform is None:
        return values[0]
    try:
        return rule.transform(*values)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"tensor '{source}' of shape {tuple(values[0].shape)} cannot be converted: {reason}"
        ) from error


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def export_weights(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """The weights of a model under the names of another program, by rules that only rename.

    Raises:
        UserError: a parameter has no rule, or one with a transform.
    """
    result = {}
    for name, value in state.items():
        if _NOT_LOADED.fullmatch(name):
            continue
        for rule in rules:
            fields = rule.match(name)
            if fields is not None and rule.transform is None:
                result[rule.alternatives(fields)[0][0]] = value
                break
        else:
            raise UserError(f"parameter '{name}' has no name in the other program")
    return result
