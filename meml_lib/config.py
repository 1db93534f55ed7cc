"""The values of a run and of a study: composed from the files in `params/`, checked against `schema`, then frozen.

A file's `use: [..]` (and an arm's) composes left to right; later wins, mappings merge, lists replace; overrides come last.
"""

from __future__ import annotations

import ast
import copy
import difflib
import html
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import yaml
from pydantic import BaseModel, PrivateAttr, ValidationError

from meml_lib import schema

Stage = Literal["mef", "riel"]
Overrides = Mapping[str, Any] | Sequence[str]
_Path = tuple[str, ...]  # of a value: ("riel", "steps")


class ParamsError(ValueError):
    """A value, key or file that cannot be used; the message names it, its place and what would be right."""


# --- places -----------------------------------------------------------------------------------------------------------


_BESIDE_PACKAGE = Path(__file__).resolve().parents[1]


def root() -> Path:
    """The project folder: the nearest one, from the working directory upwards, that holds params/base.yaml."""
    here = Path.cwd()
    for folder in (here, *here.parents, _BESIDE_PACKAGE):
        if (folder / "params" / "base.yaml").is_file():
            return folder
    return here


def locate(path: str | Path) -> Path:
    """A file that a value names: from the working directory where it stands there, else from the project folder.

    Raises: ParamsError for a $VARIABLE in it that is not set.
    """
    path = Path(os.path.expandvars(path)).expanduser()
    if path.parts and path.parts[0].startswith("$"):
        raise ParamsError(f"{path}: {path.parts[0]} is not set in the environment: set it to the folder that is meant")
    return path.absolute() if path.is_absolute() or path.exists() else root() / path


def label_of(file: Path) -> str:
    """A path as people read it: from the project folder where it lies inside."""
    return str(file.relative_to(root())) if file.is_relative_to(root()) else str(file)


def _nearest(word: str, names: Iterable[str], prefix: str = "") -> str:
    """'; did you mean ..?' or nothing."""
    found = difflib.get_close_matches(word, list(names), n=1, cutoff=0.6)
    return f"; did you mean {prefix + found[0]!r}?" if found else ""


# --- files ------------------------------------------------------------------------------------------------------------


def _read(file: Path) -> tuple[dict[str, Any], dict[_Path, int]]:
    """A YAML file's values, and the line of each."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(file.read_text(encoding="utf-8"))
    lines: dict[_Path, int] = {}

    def note(node: yaml.Node, path: _Path) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*path, str(key.value))
                if here in lines:
                    raise ParamsError(f"{label_of(file)}:{key.start_mark.line + 1}: {'.'.join(here)} stands here twice")
                lines[here] = key.start_mark.line + 1
                note(value, here)

    try:
        node = loader.get_single_node()
        values = {} if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ParamsError(f"{label_of(file)} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ParamsError(f"{label_of(file)} must hold a mapping of sections; it holds a {type(values).__name__}")
    if node is not None:
        note(node, ())
    return values, lines


def _find(name: str, beside: Path | None, named_at: str = "") -> Path:
    """The file that `use` or `run_file` names, relative to params/ (or else to the file that names it).

    Args: named_at: "file:line"; a message begins with it.
    """
    places = [root() / "params"]
    if beside is not None:
        places = [folder for folder in beside.parents if folder.name == "params"][:1] + places + [beside.parent]
    for place in places:
        if (place / name).is_file():
            return (place / name).resolve()
    known = [str(file.relative_to(place)) for place in places for file in sorted(place.rglob("*.yaml"))]
    by = f"{named_at}: " if named_at else ""
    raise ParamsError(f"{by}no file {name!r} in {label_of(places[0])}/{_nearest(name, known)}")


def _kinds(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation admits, e.g. both kinds of teacher."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in _kinds(part)]


_KINDS = {
    "task": ("name", _kinds(schema.TaskParams)),
    "model": ("source", _kinds(schema.ModelParams)),
    "teacher": ("kind", _kinds(schema.Teacher)),
}
"""Key of a section with several kinds -> the key that tells them apart, and the kinds."""


@dataclass
class _Values:
    """Nested values on their way together, and where each came from."""

    file: Path | None = None
    """The file that was asked for; None: its sections were written into a notebook, or it is a part."""
    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[_Path, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.file.stem if self.file else "notebook"

    @property
    def label(self) -> str:
        return label_of(self.file) if self.file else "notebook"

    def add_file(self, file: Path, chain: tuple[Path, ...] = ()) -> _Values:
        """Add what a file uses, then the file itself."""
        if file in chain:
            raise ParamsError("files use each other in a circle: " + " -> ".join(label_of(f) for f in (*chain, file)))
        values, lines = _read(file)
        self.add_used(values.pop("use", []), file, chain, f"{label_of(file)}:{lines.get(('use',), 1)}")
        self.merge(values, lambda path: f"{label_of(file)}:{lines.get(path, 1)}")
        return self

    def add_used(
        self, used: Any, file: Path | None, chain: tuple[Path, ...] = (), place: str = "notebook"
    ) -> None:
        """Add files that `use` names; place: where it stands."""
        if not isinstance(used, list) or not all(isinstance(name, str) for name in used):
            raise ParamsError(f"{place}: use = {used!r} must be a list of files in params/")
        for name in used:
            self.add_file(_find(name, file, place), (*chain, file) if file else chain)

    def set(self, key: str, value: Any, origin: str) -> None:
        """Set a dotted key."""
        for part in reversed(key.split(".")):
            value = {part: value}
        self.merge(value, lambda path: origin)

    def merge(
        self, layer: Mapping, origin: Callable[[_Path], str], path: _Path = (), tree: dict[str, Any] | None = None
    ) -> None:
        """Lay values over those at a path (tree: what is there): mappings merge, all else is replaced."""
        tree = self.tree if tree is None else tree
        for key, value in ((str(key), value) for key, value in layer.items()):
            here, old, nested = (*path, key), tree.get(key), isinstance(value, Mapping)
            if not (nested and isinstance(old, dict)) or _another_kind(key, old, value):
                self.origins = {known: at for known, at in self.origins.items() if known[: len(here)] != here}
                tree[key] = {} if nested else value
            if nested:
                self.merge(value, origin, here, tree[key])
            self.origins.setdefault(here, origin(here))


def _another_kind(key: str, old: Mapping, new: Mapping) -> bool:
    """Whether a later task, model or teacher is of another kind than the earlier, so that their keys cannot mix."""
    tag, kinds = _KINDS.get(key, (None, []))
    words = [get_args(kind.model_fields[tag].annotation) for kind in kinds]
    return tag in new and not any(old.get(tag) in of_kind and new[tag] in of_kind for of_kind in words)


def leaves(value: Any, path: _Path = ()) -> Iterable[tuple[_Path, Any]]:
    """(path, value) of everything in nested mappings that is no mapping itself."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, (*path, str(key)))
    else:
        yield path, value


def _overrides(given: Overrides | None) -> dict[str, Any]:
    """Overrides as dotted key -> value; text like "riel.steps=3" is read as YAML reads it."""
    if isinstance(given, Mapping):
        pairs = dict(given)
    else:
        pairs = {}
        for text in [given] if isinstance(given, str) else given or ():
            key, equals, value = str(text).partition("=")
            if not equals or not value.strip():
                start = re.split(r"[=:\s]", str(text).strip())[0]  # no more of it: it may be a secret out of place
                raise ParamsError(f"override {start!r} must read key=value, e.g. riel.steps=100 or mef.patience=null")
            try:
                pairs[key.strip()] = yaml.safe_load(value)
            except yaml.MarkedYAMLError as error:
                raise ParamsError(f"override {key.strip()!r}: its value is not YAML ({error.problem})") from None
    for key in pairs:
        if not isinstance(key, str) or not all(key.split(".")):
            raise ParamsError(f"override {key!r} must be a dotted key, e.g. riel.steps")
    return pairs


# --- checks -----------------------------------------------------------------------------------------------------------


def _checked(section: type[BaseModel], values: _Values) -> Any:
    """The values as `section`; every fault at once, each with its place, key, value, bound and nearest right key."""
    faults = []
    try:
        checked = section.model_validate(values.tree)
        as_checked = dict(leaves(checked.model_dump()))
        for path, value in leaves(values.tree):
            if wrong := _read_otherwise(value, as_checked[path]):
                faults.append(f"{values.origins[path]}: {'.'.join(path)} = {value!r}: {wrong}")
    except ValidationError as error:
        found = sorted(error.errors(include_url=False), key=lambda fault: fault["type"] == "missing")
        inner = {fault["loc"][:-1] for fault in found}  # a list with a broken item is also said to be empty
        found = [fault for fault in found if fault["type"] != "too_short" or fault["loc"] not in inner]
        faults = [_fault(section, values, fault) for fault in found]
        if values.file is None and any(fault["type"] == "missing" for fault in found):
            faults.append('(sections are a whole run file: add use = ["smoke.yaml"]; overrides changes single values)')
    if faults:
        raise ParamsError("\n".join(dict.fromkeys(faults)))
    return checked


def _read_otherwise(given: Any, taken: Any) -> str | None:
    """What is wrong with a value that pydantic read as another type: true as 1, "3" as 3 (1e-6, to YAML text, is right)."""
    both = zip(given, taken, strict=False) if isinstance(given, list) and isinstance(taken, tuple) else [(given, taken)]
    for one, read in both:
        if isinstance(one, bool) != isinstance(read, bool):
            return "must not be a yes/no value" if isinstance(one, bool) else "must be true or false"
        if isinstance(one, str) and isinstance(read, int):
            return "must be a whole number, not text"
    return None


def _fault(section: type[BaseModel], values: _Values, fault: Any) -> str:
    kinds, node, path, origin, siblings = [section], values.tree, (), values.label, []
    for part in fault["loc"]:
        siblings = sorted({name for kind in kinds for name in kind.model_fields})
        lacking = fault["type"] == "missing" and part in siblings and part not in node
        if lacking or isinstance(part, int) or isinstance(node, dict) and part in node:
            path, node = (*path, str(part)), None if lacking else node[part]
            origin = values.origins.get(path, origin)
            fields = [kind.model_fields[part].annotation for kind in kinds if part in kind.model_fields]
            kinds = [kind for annotation in fields for kind in _kinds(annotation)] if fields else kinds
        else:  # the kind of a section with several, which is no key of the file
            words = {kind: [get_args(info.annotation) for info in kind.model_fields.values()] for kind in kinds}
            kinds = [kind for kind in kinds if any(part in args for args in words[kind])] or kinds
    key, context, quote = ".".join(path), fault.get("ctx", {}), "'"
    match fault["type"]:
        case "extra_forbidden":
            section_key = ".".join(path[:-1])
            siblings += [] if section_key else ["use"]
            near = _nearest(path[-1], siblings, f"{section_key}." if section_key else "")
            near = _deeper(path, section) or near
            return f"{origin}: {key} is not a known key{near} (known here: {', '.join(siblings)})"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{origin}: {key} must be a mapping of keys; it is of type {type(node).__name__}"
        case "missing":
            hint = f"; use one of params/{key}{'' if key == 'experts' else 's'}/*.yaml" if key in _PARTS else ""
            return f"{origin}: {key} is missing: no file gives it{hint}"
        case "union_tag_not_found":
            return f"{origin}: {key}.{context['discriminator'].strip(quote)} is missing: no file gives it"
        case "union_tag_invalid" | "literal_error":
            if "tag" in context:
                key, node = f"{key}.{context['discriminator'].strip(quote)}", context["tag"]
            expected = context.get("expected") or context["expected_tags"]
            near = _nearest(str(node), re.findall("'(.*?)'", expected))
            return f"{origin}: {key} = {node!r}: must be one of {expected}{near}"
        case "value_error":
            text = str(context["error"])
            wrong, *right = re.findall(r"'(.+?)'", text) or [""]
            near = _nearest(wrong, right) if wrong not in right else ""
            return f"{', '.join(_named_in(text, path, values)) or origin}: {key + ': ' if key else ''}{text}{near}"
        case _:
            said = re.sub(r"^\w+ should", "must", fault["msg"]).replace("a valid tuple", "a list, e.g. [..]")
            near = _nearest(str(node), re.findall(r"[a-z_]{3,}", context.get("pattern", "")))
            return f"{origin}: {key} = {'null' if node is None else repr(node)}: {said}{near}"


def _named_in(text: str, path: _Path, values: _Values) -> list[str]:
    """The places of the values below a path that a message names."""
    named = ((*path, *word.split(".")) for word in re.findall(r"[\w-]+(?:\.[\w-]+)*", text))
    return list(dict.fromkeys(values.origins[key] for key in named if key in values.origins))


def _deeper(path: _Path, section: type[BaseModel]) -> str:
    """'; did you mean ..?' where a known key of the same name stands deeper: mef.lr or riel.lr for lr."""
    ends = [name.split(".") for name in _keys(section)]
    alike = [repr(".".join(end)) for end in ends if end[-1] == path[-1] and path[0] in (end[0], end[-1])]
    return f"; did you mean {' or '.join(alike)}?" if 0 < len(alike) <= 3 else ""


_PARTS = ("task", "experts", "model")


def _keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys that a section can have."""
    keys = []
    for name, info in section.model_fields.items():
        keys.append(prefix + name)
        keys += [key for kind in _kinds(info.annotation) for key in _keys(kind, f"{prefix}{name}.")]
    return list(dict.fromkeys(keys))


# --- a run ------------------------------------------------------------------------------------------------------------


_WHERE_ASKED = {"base_url", "key_from", "path", "price"}
"""Values of an API teacher that change no answer: the answers themselves are an input."""


class Run(schema.RunParams):
    """All values of one run (one arm, one seed), where each came from, and the folders that it writes to."""

    params_file: str
    run_dir: Path
    stage1_dir: Path | None
    """Stage 1's folder where arms share it; None: inside run_dir."""
    sources: dict[str, str]
    """Dotted key -> "file:line", "override" or "default"."""

    def folder(self, stage: Stage) -> Path:
        """Where a stage keeps its results."""
        if stage == "mef":
            return self.stage1_dir or self.run_dir / "stage1"
        return self.run_dir / "stage2"

    def values(self) -> dict[str, Any]:
        """Plain nested values, without folders and sources."""
        return self.model_dump(mode="json", include=set(schema.RunParams.model_fields))

    def reads(self, stage: Stage) -> dict[str, Any]:
        """The values that a stage's results depend on: no hardware, no layout of batches, no expert off the panel."""
        known = self.experts.known
        unread: dict[str, Any] = {n: {"teacher": _WHERE_ASKED} for n, e in known.items() if e.teacher.kind == "api"}
        unread |= {name: True for name in known.keys() - set(self.experts.panel)}
        parts = {"sampling": {"rows_per_batch"}, "model": {"config"}, "experts": {"known": unread}}  # config: a dry run's
        read = {"task", "experts", "model", "sampling", stage, "evaluate", "seed"}
        return self.model_dump(mode="json", include=read, exclude=parts)

    def rows(self) -> list[tuple[str, Any, str]]:
        """(dotted key, value, source) of every value."""
        paths = [(".".join(path), value) for path, value in leaves(self.values())]
        return [(key, value, self.sources.get(key, "default")) for key, value in paths]

    def _repr_html_(self) -> str:
        rows = [(key, _short(value), source) for key, value, source in self.rows()]
        return (
            f"<p><b>{html.escape(self.params_file)}</b>, seed {self.seed}, in {html.escape(label_of(self.run_dir))}</p>"
            f"<details><summary>values</summary>{_html_table(('key', 'value', 'from'), rows)}</details>"
        )


def _html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table style="font-size:85%"><tr><th>{"</th><th>".join(head)}</th></tr>{body}</table>'


def _short(value: Any, width: int = 100) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= width else text[: width - 1] + "…"


def load_run(
    file: str | Path,
    overrides: Overrides | None = None,
    run_dir: str | Path | None = None,
    stage1_dir: str | Path | None = None,
) -> Run:
    """Compose and check the values of one run.

    Args:
      file: a run file; from the working directory, the project folder or params/.
      overrides: dotted key -> value, or texts like "riel.steps=3".
      run_dir: None: reports/<file's name>/runs/<file's name>/seed-<seed>.
      stage1_dir: None: inside run_dir.
    Raises: ParamsError naming file and line, key, value, bound and the nearest right name.
    """
    return _run(_of_file(file), overrides, run_dir, stage1_dir)


def load_values(file: str | Path) -> Run:
    """The run whose resolved values `launch.train` wrote to values.json."""
    return Run.model_validate_json(Path(file).read_text(encoding="utf-8"))


_FSDP = {
    "fsdp_version": ((2,), "FSDP2"),
    "fsdp_cpu_ram_efficient_loading": ((False,), "every process loads the weights itself"),
    "fsdp_offload_params": ((False, None), "weights stay on their device"),
    "fsdp_reshard_after_forward": ((True, None), "a layer's weights are freed after it"),
    "fsdp_activation_checkpointing": ((False, None), "hardware.gradient_checkpointing says it"),
    "fsdp_auto_wrap_policy": (("TRANSFORMER_BASED_WRAP", None), "the model's own layers are divided"),
}
"""Key of an accelerate config's fsdp_config -> the values that it may have (None: it may be left out), and why."""


def accelerate_values(p: schema.RunParams) -> dict[str, Any]:
    """What the file `hardware.accelerate_config` holds; nothing where that is null.

    Raises: ParamsError naming file, key and value for what contradicts the run's values, or is not done here.
    """
    if p.hardware.accelerate_config is None:
        return {}
    file = locate(p.hardware.accelerate_config)
    if not file.is_file():
        raise ParamsError(f"hardware.accelerate_config={p.hardware.accelerate_config}: no such file")
    values, lines = _read(file)
    rules = {
        "num_processes": ((p.hardware.processes, None), "hardware.processes, of all machines"),
        "distributed_type": (("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", None), "or left out"),
        "mixed_precision": (("no", False, None), "model.dtype says it"),  # YAML reads no as false
    }
    checks = [((key,), values.get(key), *rule) for key, rule in rules.items()]
    if values.get("distributed_type") == "FSDP":
        fsdp = values.get("fsdp_config") or {}
        checks += [(("fsdp_config", key), fsdp.get(key), *rule) for key, rule in _FSDP.items()]
    for path, value, allowed, why in checks:
        if value not in allowed:
            named = " or ".join(str(each) for each in allowed if each is not None)
            place = f"{label_of(file)}:{lines.get(path, 1)}"
            raise ParamsError(f"{place}: {'.'.join(path)} = {value!r}: must be {named} ({why})")
    return values


def load_profile(name: str) -> schema.ClusterProfile:
    """What a cluster is asked for: params/profiles/NAME.yaml, or a file.

    Raises: ParamsError naming file and line, key, value, bound and the nearest right name.
    """
    return _checked(schema.ClusterProfile, _of_file(name if name.endswith(".yaml") else f"profiles/{name}.yaml"))


def _of_file(file: str | Path) -> _Values:
    path = locate(file)
    path = path.resolve() if path.is_file() else _find(str(file), None)
    return _Values(path).add_file(path)


def _run(values: _Values, overrides: Overrides | None, run_dir: Any, stage1_dir: Any) -> Run:
    for key, value in _overrides(overrides).items():
        values.set(key, value, "override")
    if "arms" in values.tree:
        raise ParamsError(f"{values.label} is a study; a run file has no `arms` (notebooks 04 and 05 take a study)")
    checked = _checked(schema.RunParams, values)
    if ("experts", "only") in values.origins:
        values.origins["experts", "panel"] = values.origins["experts", "only"]
    return Run(
        **dict(checked),
        params_file=values.label,
        run_dir=root() / (run_dir or f"reports/{values.name}/runs/{values.name}/seed-{checked.seed}"),
        stage1_dir=root() / stage1_dir if stage1_dir else None,
        sources={".".join(path): values.origins.get(path, "default") for path, _ in leaves(checked.model_dump())},
    )


# --- a study ----------------------------------------------------------------------------------------------------------


class Study(schema.StudyParams):
    """Arms x seeds over one run file, and the folders that they write to."""

    params_file: str
    name: str
    folder: Path
    run_params_file: str
    """The run file, as a notebook takes it."""
    _given: dict[str, Any] = PrivateAttr()
    _base: _Values = PrivateAttr()
    _origins: dict[_Path, str] = PrivateAttr()
    _extra: dict[str, Any] = PrivateAttr()

    def run(self, arm: str, seed: int) -> Run:
        """The values and folders of one arm with one seed."""
        if arm not in self.arms:
            near = _nearest(arm, self.arms)
            raise ParamsError(f"{self.params_file} has no arm {arm!r}{near} (arms: {', '.join(self.arms)})")
        if seed not in self.seeds:
            raise ParamsError(f"seed {seed} is not among the seeds {list(self.seeds)} of {self.params_file}")
        stage1 = next(name for name, arms in self.stage1_groups().items() if arm in arms)
        runs = self.folder / "runs"
        return self._compose(arm, seed, runs / arm / f"seed-{seed}", runs / stage1 / f"seed-{seed}" / "stage1")

    def base_run(self) -> Run:
        """The values before any arm changes them: for the notebooks on experts and overlap."""
        return self._compose(None, self.seeds[0], self.folder / "experts", None)

    def stage1_groups(self) -> dict[str, tuple[str, ...]]:
        """Name of a stage-1 folder -> the arms that share it, because all values that stage 1 reads are equal."""
        return self._groups

    @cached_property
    def _groups(self) -> dict[str, tuple[str, ...]]:
        groups: dict[str, tuple[str, list[str]]] = {}
        panels: list[str] = []
        for arm in self.arms:
            run = self._compose(arm, self.seeds[0], self.folder, None)
            key, panel = json.dumps(run.reads("mef"), sort_keys=True), "stage1-" + "+".join(run.experts.panel)
            if key not in groups:
                panels.append(panel)
                number = panels.count(panel)
                groups[key] = (panel if number == 1 else f"{panel}-{number}", [])
            groups[key][1].append(arm)
        return {name: tuple(arms) for name, arms in groups.values()}

    def parameters(self) -> dict[str, Any]:
        """What a study's notebook takes."""
        reports_dir = label_of(self.folder.parent)
        return {"params_file": self.params_file, "overrides": self._given, "reports_dir": reports_dir}

    def overrides_of(self, arm: str | None, seed: int) -> dict[str, Any]:
        """Dotted key -> value that make an arm's run out of the run file; later wins."""
        merged: dict[str, Any] = {}
        for layer in (self.overrides, self.arms[arm].overrides if arm else {}, {"seed": seed}, self._extra):
            for key, value in layer.items():
                merged.pop(key, None)  # a key given again moves to the end
                merged[key] = value
        return merged

    def _compose(self, arm: str | None, seed: int, run_dir: Path, stage1_dir: Path | None) -> Run:
        values = copy.deepcopy(self._base)
        for key, value in self.overrides_of(arm, seed).items():
            places = [("seeds",)] if key == "seed" else [("arms", arm, "overrides", key), ("overrides", key)]
            origins = (self._origins[place] for place in places if place in self._origins)
            values.set(key, value, "override" if key in self._extra else next(origins, self.params_file))
        return _run(values, None, run_dir, stage1_dir)

    def rows(self) -> list[tuple[str, Any, str]]:
        """(dotted key, value, source) of the study's own values; those of its runs stand in each run's rows."""
        own = self.model_dump(mode="json", include=set(schema.StudyParams.model_fields))
        return [(".".join(path), value, self._origins.get(path, "default")) for path, value in leaves(own)]

    def _repr_html_(self) -> str:
        rows = [
            (name, arm.label, ", ".join(f"{key}: {_short(value)}" for key, value in arm.overrides.items()))
            for name, arm in self.arms.items()
        ]
        place = f"over {self.run_params_file}, seeds {list(self.seeds)}, in {label_of(self.folder)}"
        head = f"<p><b>{html.escape(self.title)}</b>: {html.escape(self.params_file)} {html.escape(place)}</p>"
        return head + _html_table(("arm", "label", "what differs"), rows)


def load_study(file: str | Path, overrides: Overrides | None = None, reports_dir: str | Path = "reports") -> Study:
    """Compose and check a study and every run in it. A run file is a study of one arm and one seed.

    Args:
      overrides: of the study (seeds=[0,1]) or of all its runs (riel.steps=3), over everything that the files say.
      reports_dir: the study's folder is <reports_dir>/<file's name>, for a run file <reports_dir>/<file's name>-run.
    Raises: ParamsError naming file and line, key, value, bound and the nearest right name.
    """
    return _study(_of_file(file), overrides, reports_dir)


def _expand_arms(values: _Values) -> None:
    """An arm's `use: [..]`, parts of run files, becomes overrides; what the arm itself overrides wins."""
    arms = values.tree.get("arms")
    for name, arm in arms.items() if isinstance(arms, dict) else ():
        if not isinstance(arm, dict) or "use" not in arm:
            continue
        part, place = _Values(), ("arms", name, "overrides")
        part.add_used(arm.pop("use"), values.file, place=values.origins["arms", name, "use"])
        own = arm.get("overrides") or {}
        arm["overrides"] = {".".join(path): value for path, value in leaves(part.tree)} | own
        for path in part.origins:
            values.origins.setdefault((*place, ".".join(path)), part.origins[path])


def _study(values: _Values, overrides: Overrides | None, reports_dir: str | Path) -> Study:
    fields = schema.StudyParams.model_fields
    given = _overrides(overrides)
    extra = {key: value for key, value in given.items() if key.split(".")[0] not in fields}
    base, name = None, values.name
    if values.tree.keys() & fields:
        if "seed" in extra:
            raise ParamsError(f"seed={extra['seed']}: a study's runs take their seeds from `seeds`; give seeds=[..]")
        _expand_arms(values)
    else:  # a run file
        base, seed = values, extra.pop("seed", values.tree.get("seed", 0))
        tree = {"title": name, "run_file": base.label, "seeds": [seed], "arms": {name: {"label": name}}}
        values, name = _Values(base.file, tree), f"{name}-run"  # the study of a file's name keeps that folder
        values.origins["seeds",] = "override" if "seed" in given else base.origins.get(("seed",), "default")
    arms = values.tree.get("arms")
    for key, value in given.items():
        part = key.split(".")
        known: Iterable[str] = {*fields, *schema.RunParams.model_fields}
        if part[0] == "arms" and len(part) > 1 and isinstance(arms, dict):  # else a misspelt arm would be a new one
            known, part = arms, part[1:]
        if part[0] not in known:
            prefix = key.removesuffix(".".join(part))
            near = _deeper((key,), schema.RunParams) or _nearest(part[0], known, prefix)
            raise ParamsError(f"override: {prefix}{part[0]} is not a known key{near}")
        if key.split(".")[0] in fields:
            values.set(key, value, "override")
    checked = _checked(schema.StudyParams, values)
    for place in (("overrides",), *(("arms", arm, "overrides") for arm in checked.arms)):
        if (*place, "seed") in values.origins:
            at = values.origins[*place, "seed"]
            raise ParamsError(f"{at}: seed: nothing reads it here; a study's seeds are `seeds`")
    base = base or _of_file(_find(checked.run_file, values.file, values.origins["run_file",]))
    places = {"name": name, "folder": root() / reports_dir / name}
    study = Study(**dict(checked), params_file=values.label, run_params_file=base.label, **places)
    study._given, study._base, study._origins, study._extra = given, base, values.origins, extra
    base_run = study.base_run()
    panel = base_run.experts.panel
    positions = [arm for arm in study.arms if "experts.only" in study.arms[arm].overrides]
    if positions and base_run.sources["experts.only"] != "default":
        raise ParamsError(
            f"{base_run.sources['experts.only']}: experts.only is set for all arms, and by {', '.join(positions)} too:"
            " positions are those of one panel; reorder or shorten experts.panel instead"
        )
    for table, arm, against, measure in study.comparisons:
        if measure.startswith("expert-") and int(measure.removeprefix("expert-")) >= len(panel):
            place = values.origins.get(("compare", table, arm, against), values.label)
            raise ParamsError(f"{place}: {measure}: the panel {list(panel)} has positions 0 to {len(panel) - 1}")
    study.stage1_groups()  # composes and checks every arm
    return study


# --- in a notebook ----------------------------------------------------------------------------------------------------

_RUN_NAMES = ("params_file", "overrides", "run_dir", "stage1_dir")
_STUDY_NAMES = ("params_file", "overrides", "reports_dir")


def from_notebook(namespace: dict[str, Any]) -> Run:
    """The run that a notebook's parameter cells ask for: call it as `from_notebook(globals())`.

    Reads params_file, overrides, run_dir and stage1_dir; or, where `papermill -f RUN_FILE` wrote the file's sections
    into the notebook, those sections are the run file. Judged by what the parameter cells assigned, not by all names
    in the notebook, so that it may run again after other cells made names of their own.

    Raises: ParamsError for a name that nothing reads, with the nearest right one; and as load_run does.
    """
    given, values = _asked_for(namespace, _RUN_NAMES, set(schema.RunParams.model_fields))
    return _run(values, given.get("overrides"), given.get("run_dir"), given.get("stage1_dir"))


def study_from_notebook(namespace: dict[str, Any]) -> Study:
    """The study that a notebook's parameter cells ask for, as from_notebook; they may set reports_dir."""
    known = set(schema.StudyParams.model_fields) | set(schema.RunParams.model_fields)
    given, values = _asked_for(namespace, _STUDY_NAMES, known)
    return _study(values, given.get("overrides"), given.get("reports_dir") or "reports")


def _asked_for(namespace: dict[str, Any], names: Sequence[str], known: set[str]) -> tuple[dict[str, Any], _Values]:
    """(parameters by name, values of the file that they name; of the sections that papermill -f wrote)."""
    given, sections = _notebook(namespace, names, known)
    if not sections:
        if not isinstance(given.get("params_file"), str):
            raise ParamsError(f"params_file = {given.get('params_file')!r} must name a file, e.g. 'params/smoke.yaml'")
        return given, _of_file(given["params_file"])
    for file in sorted((root() / "params").rglob("*.yaml")):  # one of ours keeps its name and place
        try:
            same = _read(file)[0] == sections
        except ParamsError:
            continue  # a broken file that this notebook does not use
        if same:
            return given, _Values(file).add_file(file)
    values = _Values()
    values.add_used(sections.pop("use", []), None)
    values.merge(sections, lambda path: "notebook")
    return given, values


class _Expression(str):
    """What a parameter was given where only a plain value will do."""


class _Cell(NamedTuple):
    """One cell that holds parameters."""

    assigned: dict[str, Any]
    injected: bool
    """Written by papermill, after the notebook's own parameter cell."""


def _notebook(namespace: dict[str, Any], names: Sequence[str], sections: set[str]) -> tuple[dict, dict]:
    """(parameters by name, sections of a run or study file) that the notebook's parameter cells assigned."""
    known, history = {*names, *sections, "use"}, namespace.get("In")
    if isinstance(history, list):
        call = next((place for place, source in enumerate(history) if "from_notebook(" in source), len(history))
        found = (_parameter_cell(source, names, known, place <= call) for place, source in enumerate(history))
        cells = [cell for cell in found if cell]
    else:  # no IPython: a script
        cells = [_Cell(_literal_globals(namespace, known), injected=False)]
    _raise_strays(cells, names, known)
    given: dict[str, Any] = {}
    file: dict[str, Any] = {}
    for cell in cells:
        values = {key: value for key, value in cell.assigned.items() if not isinstance(value, _Expression)}
        # `overrides` beside `arms` is the study file's own, below its arms; else it is the notebook's, above them.
        of_study = "reports_dir" in names and not {"arms", "run_file", "use"}.isdisjoint(values)
        own = {key for key in known & values.keys() if key not in names or of_study and key == "overrides"}
        given |= {key: values[key] for key in values if key in names and key not in own}
        if own:
            file |= {key: values[key] for key in values if key in own}
        elif "params_file" in values:  # a file named after sections were written wins over them
            file = {}
    return given, file


def _parameter_cell(source: str, names: Sequence[str], known: set[str], first: bool) -> _Cell | None:
    """first: no cell has asked for the parameters yet. After that, cells explore: a lone `seed = 3` is their own."""
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a magic or a shell line
        return None
    assigns = [node for node in body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    pure = assigns == body and not any(isinstance(part, ast.Call) for node in body for part in ast.walk(node))
    cell = _Cell({}, injected=source.lstrip().startswith("# Parameters"))
    for name, value in ((node.targets[0].id, node.value) for node in assigns):
        if pure or cell.injected or name in names:  # beside code only what can be nothing but a parameter counts
            try:
                cell.assigned[name] = ast.literal_eval(value)
            except ValueError:
                cell.assigned[name] = _Expression(ast.unparse(value))
    sure = any(key in (*names, "use") or isinstance(cell.assigned[key], dict) for key in known & cell.assigned.keys())
    return cell if cell.assigned and (first or cell.injected or sure) else None


def _literal_globals(namespace: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    plain = (str, int, float, list, tuple, dict, type(None))
    literals = (key for key, value in namespace.items() if isinstance(value, plain) and key[0] != "_")
    return {key: namespace[key] for key in literals if difflib.get_close_matches(key, known, n=1, cutoff=0.8)}


def _raise_strays(cells: Sequence[_Cell], names: Sequence[str], known: set[str]) -> None:
    """Complain of what nothing reads, unless its cell has run again without it."""
    live: list[_Cell] = []
    for cell in cells:
        for place, (earlier, injected) in enumerate(live):
            mended = {near for stray in earlier.keys() - known for near in difflib.get_close_matches(stray, known, 1)}
            if injected == cell.injected and not (earlier.keys() | mended).isdisjoint(cell.assigned):
                del live[place:]  # the same cell again: the parameters start over from here
                break
        live.append(cell)
    faults = []
    for assigned, _ in live:
        if "params_file" in assigned and not (known - set(names)).isdisjoint(assigned):
            faults.append("the parameters name a params_file and give a file's sections too: keep one of them")
        for name in sorted(assigned):
            if name not in known:
                faults.append(f"{name}: nothing reads a parameter of this name{_nearest(name, known)}")
            elif isinstance(assigned[name], _Expression):
                faults.append(f"{name} = {assigned[name]}: must be a plain value, not an expression")
    if faults:
        raise ParamsError("\n".join([*faults, f"(parameters: {', '.join(names)}; or the sections of a file)"]))
