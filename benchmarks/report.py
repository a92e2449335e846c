"""What a section of the report is, and the plot of the main figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]

_OURS, _PALE, _GOAL, _STAGES = "#1f5f99", "#9dbfdc", "#c0392b", ("#e0a030", "#5aa469", "#7d5ba6")


@dataclass(frozen=True)
class Section:
    """``text``: Markdown. ``figures``: by name, lists of plain dictionaries for the plot and for other programs."""

    text: str
    figures: dict[str, Rows] = field(default_factory=dict)


def plot(figures: dict[str, Rows], path: Path, title: str) -> bool:
    """Draw what there is of the main figures; False without Matplotlib, or when there is nothing to draw."""
    panels: list[tuple[Callable[[Any, Rows], None], Rows, float]] = [
        (draw, figures[name], height)
        for name, draw, height in (
            ("limit", _draw_limit, 6.0),
            ("peers", _draw_peers, 5.0),
            ("rates", _draw_rates, 3.0),
            ("latency", _draw_latency, 3.0),
            ("scaling", _draw_scaling, 4.5),
            ("endurance", _draw_endurance, 3.0),
        )
        if figures.get(name)
    ]
    if not panels:
        return False
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib.figure import Figure

    # Two columns: the large panel on the left, the others one below the other beside it.
    left, right = (panels[:1], panels[1:]) if len(panels) > 1 else (panels, [])
    if len(right) > 3:
        left, right = [panels[0], *panels[4:]], panels[1:4]
    height = max(sum(h for _, _, h in column) for column in (left, right))
    figure = Figure(figsize=(15 if right else 9, height + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=12)
    sides = figure.subfigures(1, 2 if right else 1, squeeze=False)[0]
    for side, column in zip(sides, (left, right), strict=False):
        axes = side.subplots(len(column), 1, squeeze=False, gridspec_kw={"height_ratios": [h for _, _, h in column]})
        for ax, (draw, rows, _) in zip(axes[:, 0], column, strict=True):
            draw(ax, rows)
            ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return True


def _thousands(axis: Any) -> None:
    axis.set_major_formatter(lambda value, _: f"{value / 1e3:,.3g}k" if value >= 1e3 else f"{value:.3g}")


def _named(row: dict[str, Any]) -> str:
    return row["case"] + ("" if row.get("channels", "all") == "all" else f"\nchannels {row['channels']}")


def _draw_limit(ax: Any, rows: Rows) -> None:
    """Frames/s of each case, with what each stage reaches alone, and the goals."""
    at = range(len(rows))
    ax.barh(at, [row["ours"] for row in rows], height=0.7, color=_OURS, label="end to end, image and all", zorder=2)
    marks = (("receive", "receive alone"), ("library", "decompression alone"), ("GEMM", "GEMM alone"))
    for (key, label), colour in zip(marks, _STAGES, strict=True):
        ax.plot([row[key] for row in rows], at, "|", ms=14, mew=2.5, color=colour, label=label, zorder=3)
    ax.plot([0.7 * row["limit"] for row in rows], at, "|", ms=18, mew=1.5, color=_GOAL, ls="", zorder=4,
            label="goal: 0.7 of the slowest stage")  # fmt: skip
    for y, row in zip(at, rows, strict=True):
        ax.text(0.015, y, f"{row['ours'] / 1e3:.0f}k, {row['ours/limit']:.2f} of the limit", va="center", color="white",
                fontsize=8, zorder=5, transform=ax.get_yaxis_transform())  # fmt: skip
        if row["side"] == 192 and "u8 bslz4, dectris-v2" in row["case"] and row["channels"] == "all":
            ax.plot([80e3, 80e3], [y - 0.45, y + 0.45], color="black", lw=2, zorder=5)
            ax.annotate("goal 80k", (80e3, y - 0.45), ha="center", va="bottom", fontsize=8)
    ax.set_yticks(at, [_named(row) for row in rows], fontsize=8)
    ax.invert_yaxis()
    ax.set_xscale("log")
    low = min(row["ours"] for row in rows)
    ax.set_xlim(left=low / 8)
    _thousands(ax.xaxis)
    ax.set_xlabel("frames/s (logarithmic)")
    ax.set_title("Live through ZeroMQ, against each stage alone", loc="left")
    ax.grid(axis="x", which="major", alpha=0.3)
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(-0.1, -0.09), ncols=3, frameon=False)


def _draw_rates(ax: Any, rows: Rows) -> None:
    """The highest rate without loss of each case, against the fastest detector."""
    at = range(len(rows))
    ax.barh(at, [row["held"] for row in rows], height=0.6, color=_OURS, label="highest rate without loss")
    ax.plot([row["lost_at"] for row in rows], at, "x", color=_GOAL, mew=2, label="first rate with a loss")
    ax.plot([row["held"] / row["held/detector"] for row in rows], at, "|", ms=26, mew=2.5, color="black",
            label="the fastest detector")  # fmt: skip
    ax.set_yticks(at, [_named(row) for row in rows], fontsize=8)
    ax.invert_yaxis()
    _thousands(ax.xaxis)
    ax.set_xlabel("frames/s")
    ax.set_title("A detector that does not wait", loc="left")
    ax.grid(axis="x", alpha=0.3)
    ax.legend(fontsize=8, loc="lower right", framealpha=1.0, markerscale=0.6)
    ax.set_xlim(0, 1.7 * max(row["held"] / min(1.0, row["held/detector"]) for row in rows))


def _draw_latency(ax: Any, rows: Rows) -> None:
    """Median and 99th percentile, with their goals."""
    at = range(len(rows))
    ax.barh(at, [row["p99 ms"] for row in rows], height=0.6, color=_PALE, label="99 %")
    ax.barh(at, [row["median ms"] for row in rows], height=0.6, color=_OURS, label="median")
    for goal, key, style in zip((20, 60), ("median", "99 %"), ("-", "--"), strict=True):
        ax.axvline(goal, color=_GOAL, ls=style, lw=1.5, label=f"goal, {key}: {goal} ms")
    ax.set_yticks(at, [f"{row['case']}\n{row['rate']:,.0f} frames/s" for row in rows], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.45 * max(60, *(row["p99 ms"] for row in rows)))
    ax.set_xlabel("ms from a row's last frame to its published image, at half the sustained rate")
    ax.set_title("Latency", loc="left")
    ax.legend(fontsize=8, loc="lower right", framealpha=1.0)


def _draw_scaling(ax: Any, rows: Rows) -> None:
    """CPU time of a frame in the engine against the scan's side."""
    from matplotlib.ticker import NullLocator

    pixels = sorted({row["pixels"] // 100 for row in rows})
    styles = {"in focus": "-", "aberrated": "--"}
    colours = ("#9dbfdc", "#1f5f99", "#e0a030", "#c0392b", "#7d5ba6")
    for number, colour in zip(pixels, colours, strict=False):
        for optics, style in styles.items():
            chosen = [row for row in rows if row["pixels"] // 100 == number and row["optics"] == optics]
            chosen.sort(key=lambda row: row["side"])
            if chosen:
                label = f"{chosen[-1]['pixels']:,} px, {optics}"
                cost = [row["add us"] + row["accumulate us"] for row in chosen]
                ax.plot([row["side"] for row in chosen], cost, style, marker="o", ms=4, color=colour, label=label)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    sides = sorted({row["side"] for row in rows})
    ax.set_xticks(sides, [f"{side}x{side}" for side in sides])
    ax.set_xlabel("scan")
    ax.set_ylabel("CPU µs a frame")
    for ticks in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        ticks(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "125" else "")
    ax.minorticks_on()
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_title("The engine alone: cost of a frame by scan and bright-field pixels", loc="left")
    ax.grid(alpha=0.3, which="both")
    ax.set_ylim(top=3 * ax.get_ylim()[1])  # room for the legend
    ax.legend(fontsize=8, frameon=False, ncols=2)


def _draw_endurance(ax: Any, rows: Rows) -> None:
    """Memory over time, beside the frames that came."""
    (row,) = rows
    minutes, held, received = zip(*row["curve"], strict=True)
    ax.plot(minutes, held, color=_OURS)
    ax.set_ylim(0, 1.25 * max(held))
    ax.set_xlabel("minutes of continuous scanning")
    ax.set_ylabel("resident memory, MB")
    ax.set_title(f"Endurance: {received[-1] / 1e6:,.1f} million frames, {row['passes']:,} passes", loc="left")
    ax.grid(alpha=0.3)


def _draw_peers(ax: Any, rows: Rows) -> None:
    """Frames/s of whole scans in focus, by program; rows as ``benchmarks.peers.figures`` makes them."""
    from benchmarks.peers import GOALS

    measured = [row for row in rows if row.get("optics") == "in focus" and "run_s" in row]
    measured.sort(key=lambda row: (row["kind"] != "offline", row["scan"], row["detector"]))
    rates = [row["scan"] ** 2 / row["run_s"] for row in measured]
    at: list[float] = []
    for row, before in zip(measured, [None, *measured[:-1]], strict=True):
        same = before is not None and all(row[key] == before[key] for key in ("kind", "scan", "detector"))
        at.append((at[-1] if at else 0.0) + (1.0 if same else 1.6))
    ours = [row["program"] == "liveptycho" for row in measured]
    ax.barh(at, rates, height=0.85, color=[_OURS if own else _PALE for own in ours])
    for y, rate, row, own in zip(at, rates, measured, ours, strict=True):
        ax.annotate(f" {rate:,.0f}", (rate, y), va="center", fontsize=7)
        goal = GOALS.get(f"{row['program']} {row['kind']}", {}).get(row["scan"])
        if goal is None or own:
            continue
        for y_ours, other, is_ours in zip(at, measured, ours, strict=True):
            if is_ours and all(row[key] == other[key] for key in ("kind", "scan", "detector")):
                ax.plot([goal * rate] * 2, [y_ours - 0.45, y_ours + 0.45], color=_GOAL, lw=2)
    labels = [
        f"{row['program']}, {row['kind']}{', ' + row['sender'] if 'sender' in row else ''}, "
        f"{row['scan']}x{row['scan']}, detector {row['detector']}"
        for row in measured
    ]
    ax.set_yticks(at, labels, fontsize=7)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set_xlim(right=4 * max(rates, default=1.0))
    _thousands(ax.xaxis)
    ax.set_xlabel("frames/s without the set-up (logarithmic); goals in red")
    ax.set_title("Against peers: same data, same machine", loc="left")
