"""Pictures: one style, a colour-blind safe palette, and the numbers behind each.

A function returns a `Picture`, which a notebook shows as it stands and `save` writes as PDF, PNG and CSV. Names
(experts, arms) keep colour, marker and line by their place in `order`; give the whole list where a picture shows only
some of them. Marker, line and hatch differ too, so that a picture reads in grey. Shares are drawn in percent.
matplotlib is imported on the first picture; pyplot, which keeps figures alive, is not used.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from meml_lib.analysis import overlap, stats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without yellow (too faint on white); black stands for "all together".
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS, HATCHES = "osD^vPX", ("", "//", "..")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "axes.axisbelow": True,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "hatch.linewidth": 0.6,
    "pdf.fonttype": 42,
}


class Look(NamedTuple):
    color: str
    marker: str
    linestyle: object


@dataclass(frozen=True)
class Picture:
    """A figure and the table of the numbers that it shows."""

    figure: Figure
    data: pd.DataFrame

    def png(self, dpi: int = 110) -> bytes:
        from PIL import Image

        full, small = io.BytesIO(), io.BytesIO()
        with _style():
            self.figure.savefig(full, format="png", dpi=dpi)
        Image.open(full).convert("RGB").quantize(256).save(small, "png", optimize=True)  # a third of the bytes
        return small.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()


def save(picture: Picture, stem: Path | str) -> Path:
    """Write STEM.pdf, STEM.png and STEM.csv (the numbers); the PNG's path. The same picture gives the same bytes."""
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    with _style():
        picture.figure.savefig(stem.with_suffix(".pdf"), metadata={"CreationDate": None})
    stem.with_suffix(".png").write_bytes(picture.png(dpi=150))
    picture.data.to_csv(stem.with_suffix(".csv"), index=False, float_format="%.6g")
    return stem.with_suffix(".png")


def looks(names: Sequence[str], order: Sequence[str] | None = None) -> dict[str, Look]:
    """Colour, marker and line of each name, by its place in `order` (default: in names).

    Colours repeat after seven, with other markers and lines.
    """
    places = {name: divmod(place, 7) for place, name in enumerate(dict.fromkeys([*(order or ()), *names]))}
    shifted = {name: (place, (place + turn) % 7) for name, (turn, place) in places.items()}
    return {name: Look(COLOURS[i], MARKERS[k], LINES[k]) for name, (i, k) in shifted.items() if name in names}


# --- who errs where ---------------------------------------------------------------------------------------------------


def error_overlap(answers: pd.DataFrame, *, title: str = "Error overlap", note: str = "", largest: int = 16) -> Picture:
    """Pairwise intersection over union of the error sets, and how many questions each exact set of experts gets wrong.

    `largest`: at most this many sets are drawn; the data holds all.
    """
    shared, sizes = overlap.shared_errors(answers), overlap.wrong_together(answers)
    experts, shown = list(answers["expert"].unique()), sizes.head(largest)
    right = overlap.accuracy(answers).set_index("expert")["share"]
    with _figure(8.8 + 0.25 * max(0, len(shown) - 8), 3.9, note or _count_note(shared["n"][0])) as figure:
        widths, heights = [1, 0.9 + 0.09 * len(shown)], [2.4, 0.35 + 0.2 * len(experts)]
        grid = figure.add_gridspec(2, 2, width_ratios=widths, height_ratios=heights)
        _pairs(figure.add_subplot(grid[:, 0]), shared, experts, "iou", "Blues", (0, 1))
        figure.axes[0].set_title("Errors shared by two: intersection / union, %")
        figure.axes[0].set_anchor("N")
        bars, dots = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])
        places = np.arange(len(shown))
        wrong = shown[experts].to_numpy()
        all_or_none = [("#7F7F7F" if row.any() and not row.all() else "#222222") for row in wrong]
        drawn = bars.bar(places, shown["questions"], color=all_or_none, width=0.72)
        bars.bar_label(drawn, fontsize=8, padding=1)
        bars.set(ylabel="questions", xticks=[], xlim=(-0.6, max(5, len(shown)) - 0.4))
        bars.grid(axis="x", visible=False)
        bars.margins(y=0.12)
        bars.set_title("Questions wrong for exactly these")
        for place, row in enumerate(wrong):
            members = np.flatnonzero(row)
            dots.plot([place] * len(experts), range(len(experts)), "o", color="#DDDDDD", markersize=5)
            dots.plot([place] * len(members), members, "o-", color="#222222", markersize=5, linewidth=1)
        names = [f"{name} ({100 * (1 - right[name]):.1f} % wrong)" for name in experts]
        dots.set(yticks=range(len(experts)), yticklabels=names, xticks=[], xlim=bars.get_xlim())
        dots.set_ylim(len(experts) - 0.5, -0.5)
        dots.grid(visible=False)
        dots.spines[:].set_visible(False)
        dots.tick_params(length=0, labelsize=8)
        everyone = shared.iloc[-1]
        both = f"{_numbers(everyone, 'iou')} % of union, {_numbers(everyone, 'all_wrong_share')} % of all"
        figure.suptitle(f"{title} (all {len(experts)} wrong: {both})", x=0.01, ha="left", fontsize=10.5)
    return Picture(figure, sizes)


def phi(answers: pd.DataFrame, *, title: str = "Correlation of being right (phi)", note: str = "") -> Picture:
    """Heatmap of the phi coefficient of each two experts; a dash where one is always or never right."""
    shared = overlap.shared_errors(answers)
    experts = list(answers["expert"].unique())
    size = max(4.4, 1.2 + 0.8 * len(experts))
    with _figure(size, size - 0.6, note or _count_note(shared["n"][0])) as figure:
        _pairs(figure.subplots(), shared, experts, "phi", "PuOr", (-1, 1), scale=1, digits=2)
        figure.axes[0].set_title(title)
    return Picture(figure, shared)


def coverage(answers: pd.DataFrame, *, order: Sequence[str] | None = None, note: str = "") -> Picture:
    """Share of questions that at least one expert gets right, as experts are added in three orders; 95 % intervals.

    A point carries the colour and marker of the expert that was added there.
    """
    table = overlap.coverage(answers)
    style, edge = looks(list(answers["expert"].unique()), order), {"markeredgecolor": "#222222", "zorder": 3}
    greedy = "greedy: each time the expert that adds most (its low limit is of a choice made on other questions)"
    with _figure(7.2, 3.6, note or f"{_count_note(table['n'][0])}; bars: 95 % intervals; {greedy}") as figure:
        axes = figure.subplots()
        for place, (name, line) in enumerate(zip(table["order"].unique(), ("-", "--", ":"), strict=True)):
            part = table[table["order"] == name]
            at, share = part["experts"] + 0.02 * len(style) * (place - 1), 100 * part["share"]
            reach = [share - 100 * part["low"], 100 * part["high"] - share]
            axes.errorbar(at, share, reach, color="#222222", linestyle=line, capsize=2, elinewidth=1.0, label=name)
            for expert, x, y in zip(part["added"].dropna(), at, share, strict=False):
                axes.plot(x, y, style[expert].marker, color=style[expert].color, **edge)
        for expert, look in style.items():
            axes.plot([], [], look.marker, color=look.color, label=f"+ {expert}", **edge)
        axes.set(title="At least one expert right", ylabel="% of questions", xlabel="experts", ylim=(0, 102))
        axes.set_xticks(sorted(table["experts"].unique()))
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside right center")
    return Picture(figure, table)


def prompt_teacher(table: pd.DataFrame, *, order: Sequence[str] | None = None, note: str = "") -> Picture:
    """How likely each teacher's answers are under each expert's prompt: nats per token, mean over questions.

    Experts are distinct where the largest of each row and of each column is the framed one.
    Args: table: stage 1's `prompt_teacher` of one seed. order: names in the order of rows and columns.
    """
    rows = []
    for prompt, nats in overlap.nats_per_token(table).groupby(level="prompt", sort=False):
        for teacher, values in nats.items():
            mean = stats.crossed_mean(values.to_numpy()[None])
            cell = {"prompt": prompt, "teacher": teacher, "n": mean.n_questions, "nats_per_token": mean.mean}
            rows.append({**cell, "low": mean.low, "high": mean.high})
    data = pd.DataFrame(rows)
    prompts, teachers = ([n for n in order or data[of].unique() if n in set(data[of])] for of in ("prompt", "teacher"))
    text = data["nats_per_token"].map("{:.3f}".format) + "\n" + data.apply("[{low:.3f}, {high:.3f}]".format_map, axis=1)
    wide = data.assign(text=text).pivot(index="prompt", columns="teacher").reindex(prompts)
    means, texts = (wide[column][teachers] for column in ("nats_per_token", "text"))
    count = f"n = {data['n'].iloc[0]} {table['split'].iloc[0]} questions that every teacher answered, one seed"
    reading = "distinct experts: the largest value of each row and of each column is in the frame (own teacher)"
    note = f"{note or count}; brackets: 95 % intervals (questions random); {reading}"
    from matplotlib.patches import Rectangle

    with _figure(1.9 + 1.25 * len(teachers), 1.3 + 0.8 * len(prompts), note) as figure:
        axes = figure.subplots()
        _heatmap(axes, means, "Blues", (means.min(axis=None), means.max(axis=None)), texts)
        axes.set_aspect("auto")
        axes.set(xlabel="teacher whose answer it is", ylabel="expert's prompt")
        axes.set_title("Log-likelihood of the teachers' answers (nats per token)")
        for own in set(prompts) & set(teachers):
            corner = teachers.index(own) - 0.46, prompts.index(own) - 0.46
            axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=COLOURS[1], linewidth=2.4))
    return Picture(figure, data)


def shares(
    table: pd.DataFrame, x: str, *, title: str, xlabel: str = "", by: str = "expert",
    order: Sequence[str] | None = None, note: str = "lines: 95 % intervals",
) -> Picture:  # fmt: skip
    """Shares with their 95 % intervals over the values of column `x`; a line for each name in column `by`.

    Args: table: x, share, low, high, n (as `overlap`'s tables), and `by` where it is not x. note: after the counts.
    """
    names = list(table[by].unique()) if x != by else [""]
    style, places = looks(names, order), {value: place for place, value in enumerate(table[x].unique())}
    counts = sorted(table["n"].unique())
    n = f"{counts[0]:g} to {counts[-1]:g}" if len(counts) > 1 else f"{counts[0]:g}"
    with _figure(max(4.2, 1.6 + 1.1 * len(places)), 2.9, f"n = {n} questions a point; {note}") as figure:
        axes = figure.subplots()
        for place, name in enumerate(names):
            part = table[table[by] == name] if name else table
            at = part[x].map(places) + 0.12 * (place - (len(names) - 1) / 2)
            reach = 100 * np.array([part["share"] - part["low"], part["high"] - part["share"]]).clip(0)
            look = style[name]._asdict() | ({} if name else {"linestyle": "none", "color": "#222222"})
            axes.errorbar(
                at, 100 * part["share"], reach, label=name or None, capsize=2, elinewidth=1.0, markersize=5, **look
            )
        axes.set_xticks(list(places.values()), [str(value) for value in places], rotation=20 * (x == by))
        axes.set(title=title, ylabel="% of questions", ylim=(0, 102), xlabel=xlabel, xlim=(-0.5, len(places) - 0.5))
        axes.grid(axis="x", visible=False)
        if len(names) > 1:
            figure.legend(loc="outside right upper")
    return Picture(figure, table)


# --- training ---------------------------------------------------------------------------------------------------------


def curves(metrics: pd.DataFrame, *, order: Sequence[str] | None = None, title: str = "", note: str = "") -> Picture:
    """How a stage went, from its metrics: raw values faint, a running mean of 5 % of the steps over them.

    Stage 1: loss, validation. Stage 2: reward, all-wrong / mixed / all-right groups, losses, buffer, entropy, and
    validation or else the rollouts that cannot count.
    """
    riel = "reward" in metrics
    prefix = "reward/" if riel else "validation_accuracy/"
    experts = [column.removeprefix(prefix) for column in metrics if column.startswith(prefix)]
    style, alone = looks(experts, order), Look("black", "", "-")
    validated = any(column.startswith("validation_accuracy") and metrics[column].notna().any() for column in metrics)
    note = note or f"{len(metrics)} steps, one seed; faint: each step; bold: running mean of {_window(metrics)} steps"
    with _figure(9.6 if riel or validated else 5.2, 5.4 if riel else 2.9, note) as figure:
        panels = iter(figure.subplots(2, 3).flat if riel else figure.subplots(1, 1 + validated, squeeze=False).flat)
        if riel:
            axes = _panel(next(panels), "Reward", "mean reward (0 to 1)")
            for name in experts:
                _smooth(axes, metrics, f"reward/{name}", name, style[name])
            if len(experts) > 1:
                _smooth(axes, metrics, "reward", "all", alone)
            axes.set_ylim(0, 1)
            _groups(_panel(next(panels), "Groups of rollouts", "% of (question, expert)"), metrics)
            axes = _panel(next(panels), "Losses, before their weights", "nats per token")
            for name, look in looks(["grpo", "mutual", "buffer_sft"]).items():
                if f"rows/{name}" in metrics:
                    trained = metrics[metrics[f"rows/{name}"] > 0]  # a step without rows has no loss
                    _smooth(axes, trained, f"loss/{name}", name if len(trained) else f"{name} (never)", look)
            _buffer(_panel(next(panels), "Hard-example buffer", "questions held"), metrics)
            axes = _panel(next(panels), "Entropy of the policy", "nats per token")
            _smooth(axes, metrics, "entropy", "", alone)
            axes.set_ylim(bottom=0)
            if not validated:
                axes = _panel(next(panels), "Rollouts that cannot count", "share of rollouts (0 to 1)")
                for name, look in looks(["truncated", "unreadable"]).items():
                    _smooth(axes, metrics, name, name, look)
        else:
            axes = _panel(next(panels), "Loss", "nats per token")
            _smooth(axes, metrics, "loss", "training", Look(COLOURS[0], "", "-"))
            if "validation_loss" in metrics:
                seen = metrics.dropna(subset="validation_loss")
                axes.plot(seen["step"], seen["validation_loss"], "s--", color=COLOURS[1], label="validation")
        if validated:
            _validation(_panel(next(panels), "Validation accuracy (greedy)", "% of questions"), metrics, experts, style)
        for axes in figure.axes:
            axes.set_xlim(metrics["step"].min() - 0.5, metrics["step"].max() + 0.5)
            if axes.get_legend_handles_labels()[0] and axes.get_legend() is None:
                axes.legend()
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    return Picture(figure, metrics)


def rewards(
    runs: Mapping[str, Sequence[pd.DataFrame]], *, order: Sequence[str] | None = None, note: str = ""
) -> Picture:
    """Training reward, and share of all-wrong groups, against step for each arm (figure 2 of the paper).

    Args: runs: arm -> the metrics of each of its seeds. The line is the mean over seeds, the band their range.
    """
    style, tables = looks(list(runs), order), []
    note = note or "training rollouts; running means of 5 % of the steps; line: mean of the seeds; band: their range"
    with _figure(9.6, 3.9, note) as figure:
        panels = {"reward": ("Training reward", 1), "groups_all_wrong": ("Groups that are all wrong", 100)}
        for axes, (column, (heading, scale)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            _panel(axes, heading, "mean reward of a rollout" if scale == 1 else "% of groups")
            for arm, seeds in runs.items():
                smooth = [_running(metrics.set_index("step")[column]) for metrics in seeds]
                lines = pd.concat(smooth, axis=1).dropna() * scale
                look = {**style[arm]._asdict(), "markevery": max(1, len(lines) // 8), "markersize": 5}
                band = lines.min(axis=1), lines.max(axis=1)
                axes.fill_between(lines.index, *band, color=look["color"], alpha=0.1, lw=0)
                axes.plot(lines.mean(axis=1), label=f"{arm} ({len(seeds)})", markeredgecolor="#222222", **look)
                values = lines.set_axis([f"seed_{i}" for i in range(len(seeds))], axis=1)
                tables.append(values.assign(arm=arm, measure=column).reset_index())
            axes.set_ylim(0, max(axes.get_ylim()[1], 0.05 * scale))
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3, title="arm (seeds)", alignment="left")
    return Picture(figure, pd.concat(tables, ignore_index=True))


# --- after training ---------------------------------------------------------------------------------------------------


def before_after(scores: pd.DataFrame, *, order: Sequence[str] | None = None, note: str = "") -> Picture:
    """Accuracy of each expert after stage 1 (hollow) and after stage 2 (filled), with 95 % intervals.

    Args: scores: label (arm), expert, stage ("stage 1" or "stage 2"), mean, low, high (shares).
    """
    style = looks(list(scores["expert"].unique()), order)
    rows = list(scores[["label", "expert"]].drop_duplicates().itertuples(index=False, name=None))
    arms = list(dict.fromkeys(label for label, _ in rows))
    height = {row: place + 0.6 * arms.index(row[0]) for place, row in enumerate(rows)}  # a gap between arms
    with _figure(7.2, 1.3 + 0.3 * max(height.values()), note) as figure:
        axes = figure.subplots()
        for row in scores.itertuples():
            look, after = style[row.expert], row.stage == "stage 2"
            at = height[row.label, row.expert] + (0.14 if after else -0.14)
            _point(axes, at, row, look, filled=after)
        axes.set_yticks(list(height.values()), [expert for _, expert in rows])
        _headings(axes, {label: at for (label, _), at in reversed(height.items())} if len(arms) > 1 else {})
        axes.set_ylim(max(height.values()) + 0.6, -1.2 if len(arms) > 1 else -0.6)
        axes.grid(axis="y", visible=False)
        _percent_axis(axes, "greedy test accuracy (%)")
        axes.set_title("Each expert's accuracy: stage 1 hollow, stage 2 filled")
    return Picture(figure, scores)


def arms(scores: pd.DataFrame, *, note: str = "") -> Picture:
    """Mean expert accuracy of each arm with its 95 % interval, each seed as a small dot; a colour a kind of arm.

    Args: scores: label, kind, mean, low, high (shares), per_seed (seed -> share). Arms of a kind stand together.
    """
    kinds = list(scores["kind"].unique())
    style, rows = looks(kinds), scores.sort_values("kind", key=lambda kind: kind.map(kinds.index), kind="stable")
    height = [place + 0.9 * kinds.index(kind) for place, kind in enumerate(rows["kind"])]  # a heading above each kind
    with _figure(7.2, 1.2 + 0.36 * max(height), note) as figure:
        axes = figure.subplots()
        for at, row in zip(height, rows.itertuples(), strict=True):
            seeds, look = 100 * np.array(list(row.per_seed.values())), style[row.kind]
            axes.plot(seeds, [at + 0.27] * len(seeds), ".", color=look.color, markersize=5, alpha=0.7)
            _point(axes, at, row, look, filled=True)
            axes.text(100 * row.mean, at - 0.14, f"{100 * row.mean:.1f}", ha="center", va="bottom", fontsize=7.5)
        axes.set_yticks(height, rows["label"])
        _headings(axes, dict(zip(rows["kind"][::-1], height[::-1], strict=True)))
        axes.set_ylim(max(height) + 0.6, -1.3)
        axes.grid(axis="y", visible=False)
        _percent_axis(axes, "mean expert accuracy, greedy, test (%)")
    return Picture(figure, rows.assign(per_seed=[str(seeds) for seeds in rows["per_seed"]]))


# --- parts ------------------------------------------------------------------------------------------------------------


@contextmanager
def _style():
    """The kit's style, whatever a user's matplotlibrc says; within the block only."""
    import matplotlib

    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "backend": matplotlib.rcParams["backend"]}):
        yield


@contextmanager
def _figure(width: float, height: float, note: str):
    """A figure in the kit's style, in inches, its caption below."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(width, height + (0.2 if note else 0)), layout="constrained")
        yield figure
        if note:
            caption = "\n".join(textwrap.wrap(note, int(width * 17)))
            figure.supxlabel(caption, x=0.01, ha="left", fontsize=7.5, color="#444444")
        figure.draw_without_rendering()  # lays out once; both files then take the same places
        figure.set_layout_engine("none")


def _panel(axes: Axes, title: str, ylabel: str) -> Axes:
    axes.set(title=title, ylabel=ylabel, xlabel="step")
    axes.locator_params(axis="x", integer=True, nbins=7)
    return axes


def _pairs(
    axes: Axes, shared: pd.DataFrame, experts: Sequence[str], of: str, cmap: str, limits: tuple, **text: Any
) -> None:
    """A number of each two experts, with its interval where cells are large enough."""
    alone = "" if len(experts) > 1 else "one expert: no pair"
    values, texts = (pd.DataFrame(empty, experts, experts) for empty in (np.nan, alone))
    for (one, other), row in zip(combinations(experts, 2), shared.to_dict("records"), strict=False):
        number, _, interval = _numbers(row, of, **{"digits": 0} | text).partition(" ")
        for place in ((one, other), (other, one)):
            values.loc[place] = row[of]
            texts.loc[place] = f"{number}\n{interval}" if interval and len(experts) < 6 else number
    _heatmap(axes, values, cmap, limits, texts)


def _heatmap(axes: Axes, matrix: pd.DataFrame, cmap: str, limits: tuple[float, float], texts: pd.DataFrame) -> None:
    values = matrix.to_numpy(dtype=float)
    image = axes.imshow(values, cmap=cmap, vmin=limits[0], vmax=limits[1])
    axes.set_facecolor("#EEEEEE")  # shows where there is no number
    for (i, j), value in np.ndenumerate(values):
        dark = not np.isnan(value) and np.dot(image.cmap(image.norm(value))[:3], (0.30, 0.59, 0.11)) < 0.5
        color = "white" if dark else "black"
        axes.text(j, i, texts.iloc[i, j], ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(matrix.columns)), matrix.columns, rotation=25, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(matrix)), matrix.index)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8)


def _window(metrics: pd.DataFrame) -> int:
    return max(1, len(metrics) // 20)


def _running(values: pd.Series) -> pd.Series:
    return values.rolling(_window(values.to_frame()), center=True, min_periods=1).mean()


def _smooth(axes: Axes, metrics: pd.DataFrame, column: str, label: str, look: Look) -> None:
    if column not in metrics:
        return
    seen = metrics.dropna(subset=column)
    every = max(1, len(seen) // 8)
    axes.plot(seen["step"], seen[column], color=look.color, alpha=0.22, linewidth=0.8)
    marks = {"markevery": every, "markersize": 4}
    axes.plot(seen["step"], _running(seen[column]), label=label or None, **marks, **look._asdict())


def _groups(axes: Axes, metrics: pd.DataFrame) -> None:
    """Stacked shares; only mixed groups give the policy gradient anything to learn from."""
    shares = [100 * _running(metrics[f"groups_{kind}"]) for kind in ("all_wrong", "mixed", "all_right")]
    stack = axes.stackplot(
        metrics["step"], *shares, labels=["all wrong", "mixed", "all right"], colors=["#D55E00", "#F2F2F2", "#56B4E9"]
    )
    for area, hatch in zip(stack, HATCHES, strict=True):
        area.set(hatch=hatch, edgecolor="#555555", linewidth=0.4)
    axes.set_ylim(0, 100)
    axes.legend(loc="upper center", ncols=3, frameon=True, fontsize=7, columnspacing=0.8, handlelength=1.3)


def _validation(axes: Axes, metrics: pd.DataFrame, experts: Sequence[str], style: Mapping[str, Look]) -> None:
    for name in experts:
        if (column := f"validation_accuracy/{name}") in metrics:
            seen = metrics.dropna(subset=column)
            axes.plot(seen["step"], 100 * seen[column], label=name, markersize=4, **style[name]._asdict())
    axes.set_ylim(0, max(1.05 * axes.get_ylim()[1], 5))


def _buffer(axes: Axes, metrics: pd.DataFrame) -> None:
    size, flushes = metrics["buffer_size"], metrics["buffer_flushes"]
    axes.plot(metrics["step"], size, color="black", drawstyle="steps-post", linewidth=1)
    at = metrics.loc[flushes.diff().fillna(flushes.iloc[0]) > 0, "step"]
    if len(at):  # an unclipped line without points would take part in the layout, at the corner of the figure
        axes.plot(at, np.zeros(len(at)), "|", color=COLOURS[1], markersize=10, markeredgewidth=1.4, clip_on=False)
    axes.set_ylim(0, max(1, 1.05 * size.max()))
    axes.locator_params(axis="y", integer=True)
    axes.set_title(f"Buffer: {int(flushes.max())} flushes (ticks)" if size.max() or flushes.max() else "Buffer: unused")


def _headings(axes: Axes, tops: Mapping[str, float]) -> None:
    """Names of groups of rows, each above the row where it begins."""
    for name, top in tops.items():
        axes.text(0, top - 0.6, name, transform=axes.get_yaxis_transform(), fontsize=8, weight="bold", va="bottom")


def _point(axes: Axes, at: float, row, look: Look, *, filled: bool) -> None:
    mean, low, high = 100 * row.mean, 100 * row.low, 100 * row.high
    axes.plot([low, high], [at, at], color=look.color, linewidth=1.4, linestyle="-" if filled else ":")
    face = look.color if filled else "white"
    axes.plot(mean, at, marker=look.marker, color=look.color, markerfacecolor=face, markersize=6)


def _percent_axis(axes: Axes, label: str) -> None:
    low, high = axes.get_xlim()
    axes.set(xlabel=label, xlim=(max(-2, low), min(102, high)))


def _numbers(row: Mapping[str, Any], name: str, **form: Any) -> str:
    return stats.text({"mean": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"]}, **form)


def _count_note(questions: int) -> str:
    return f"n = {questions} questions, one answer of each expert; unreadable answers count as wrong"
