"""Writes the page of near-duplicates and of clips of one source: how many groups each threshold gives, pairs around the
thresholds as film strips, and the groups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpr_fast.data.index.index import Video
from cpr_fast.evaluate.duplicates.find import Duplicates
from cpr_fast.evaluate.duplicates.groups import Pairs
from cpr_fast.evaluate.retrieval.names import VIEW_NAMES, percent
from cpr_fast.report.figures.bars import histogram_figure
from cpr_fast.report.figures.film_strip import strip_uri, whole_strip
from cpr_fast.report.figures.table import Column, Table
from cpr_fast.report.neighbours import frames_agreement
from cpr_fast.report.page import render, write_page
from cpr_fast.report.run_folder.features import names_of
from cpr_fast.report.sections.sheets import clip
from cpr_fast.report.similar import MOST_ROWS, SAME_PICTURES
from cpr_fast.wording import counted

AROUND, GROUPS, MEMBERS = 3, 8, 5  # pairs on each side of a threshold, groups, and videos of each that are shown
SAMPLED = 6  # pairs of each row of the table whose frames are compared
MOST_NAMED = 200_000  # videos of an index whose names are shortened
NO_GROUPS = "There are no groups."
NOT_READ = "There is no such pair, or none whose frames can be read."


def write_duplicates(found: Duplicates, index_csv: Path, new_csv: Path, out: Path) -> list[float | None]:
    """Writes the page to `out`.

    Returns for each row of `found.table` the share of the sampled pairs whose frames agree; None where none could be
    compared."""
    page = _Page(found)
    shares = page.frames()
    values = {
        "name": index_csv.name,
        "facts": page.facts(index_csv, new_csv),
        "result": page.result(),
        "doubts": found.doubts(),
        "table_of_thresholds": page.table(shares),
        "agreement": SAME_PICTURES,
        "sampled": SAMPLED,
        "closest": page.closest(),
        "around": [page.around(name, least) for name, least in
                   (("near-duplicates", found.duplicate), ("siblings", found.sibling))],
        "duplicates": page.groups(found.duplicates),
        "siblings": page.groups(found.siblings, beyond=found.duplicates),
        "pairs_table": page.pairs(),
    }  # fmt: skip
    write_page(render("duplicates.html.j2", **values), out)
    return shares


class _Page:
    """The values of the page."""

    def __init__(self, found: Duplicates) -> None:
        self.found, self.index = found, found.compared.index

    def facts(self, index_csv: Path, new_csv: Path) -> list[tuple[str, str]]:
        found = self.found
        views = " and ".join(VIEW_NAMES[view] for view in found.compared.views)
        compared = len(found.compared.positions)
        left_out = len(self.index) - compared
        return [
            ("Index", str(index_csv)),
            ("New index, with the sources found", str(new_csv)),
            (
                "Videos",
                f"{compared:,}" + (f"; {left_out:,} without features are left out" * bool(left_out)),
            ),
            ("Similarity", f"cosine, from -1 to 1, of the features of {views}: {found.compared.what}"),
            ("Neighbours of each video", f"the {found.neighbours} nearest, exactly"),
        ]

    def result(self) -> list[str]:
        found, summary = self.found, self.found.summary()
        lines = [
            f"{name}, similarity {part['threshold']:g} or more: {counted(part['groups'], 'group')} of "
            f"{counted(part['clips'], 'video')}, the largest of {part['largest']:,}."
            for name, part in (("Near-duplicates", summary["duplicate"]), ("Siblings", summary["sibling"]))
        ]
        lines.append(
            f"{counted(summary['sources_before'], 'source')} of the index become {summary['sources']:,}: videos of one "
            "group of siblings and videos of one source of the index get the same."
        )
        if known := found.agreement:
            share = {name: "not defined" if known[name] is None else percent(known[name])
                     for name in ("precision", "recall")}  # fmt: skip
            lines.append(
                f"Compared with the sources of the index: of {counted(known['pairs'], 'pair')} in the groups of "
                f"siblings {known['both']:,} are of one source (precision {share['precision']}), which are "
                f"{share['recall']} of the {counted(known['known_pairs'], 'pair')} of one source (recall)."
            )
        return lines

    def frames(self) -> list[float | None]:
        """Returns, for each row of the table, of SAMPLED pairs between its threshold and the next greater one the share
        whose frames agree."""
        shares: list[float | None] = []
        pairs, begin = self.found.pairs, 0
        for row in self.found.table:
            end = len(pairs.above(row["threshold"]).first)
            chosen = np.unique(np.linspace(begin, end - 1, min(SAMPLED, end - begin)).round().astype(int)).tolist()
            compared = [frames_agreement(*self._of(pairs, place)) for place in chosen]
            known = [value for value in compared if value is not None]
            shares.append(sum(value >= SAME_PICTURES for value in known) / len(known) if known else None)
            begin = end
        return shares

    def _of(self, pairs: Pairs, place: int) -> tuple[Video, Video]:
        """Returns the videos of a pair."""
        first, second = self.found.compared.positions[[pairs.first[place], pairs.second[place]]].tolist()
        return self.index[first], self.index[second]

    def table(self, shares: Sequence[float | None]) -> Table:
        columns = [
            Column("Similarity at least", "text"), Column("Pairs", "count"), Column("Groups", "count"),
            Column("Videos in groups", "count"), Column("Largest group", "count"),
            Column("Frames agree, %", "rate", NOT_READ, "of pairs between this similarity and that of the row above"),
        ]  # fmt: skip
        if self.found.agreement is not None:
            columns += [
                Column("Precision, %", "rate", NO_GROUPS, "of the pairs of groups, those of one source of the index"),
                Column("Recall, %", "rate", "", "of the pairs of one source of the index, those in one group"),
            ]
        rows = []
        for row, share in zip(self.found.table, shares, strict=True):
            cells = (row["pairs"], row["groups"], row["clips"], row["largest"], share)
            known = (row["precision"], row["recall"]) if self.found.agreement is not None else ()
            rows.append((f"{row['threshold']:g}", *cells, *known))
        return Table("Groups by threshold", columns, rows)

    def closest(self) -> Any:
        """Returns the figure of the pairs of the graph, by similarity."""
        values = self.found.pairs.similarity
        if not len(values):
            return None
        step = -(-len(values) // 100_000)
        return histogram_figure(values[::step].tolist(), x="similarity", title="Pairs of neighbours by similarity")

    def _clip(self, video: Video, note: str = "") -> dict[str, Any]:
        shown = clip(video.path, video.label, video.source, strip_uri(whole_strip(video.path, video.num_frames)))
        return shown | {"caption": video.path.name, "note": note}

    def _pair(self, pairs: Pairs, place: int) -> dict[str, Any]:
        first, second = self._of(pairs, place)
        value = frames_agreement(first, second)
        text = (
            "The frames cannot be read." if value is None else f"Correlation of the pixels of their frames {value:.2f}."
        )
        text += " Of one source in the index." if first.source == second.source else ""
        return {"query": self._clip(first), "text": text,
                "found": [self._clip(second, f"similarity {pairs.similarity[place]:.4f}")]}  # fmt: skip

    def around(self, name: str, least: float) -> dict[str, Any]:
        """Returns the pairs whose similarity is nearest to a threshold, above and below it."""
        pairs = self.found.pairs
        count = len(pairs.above(least).first)
        above = range(max(0, count - AROUND), count)
        below = range(count, min(count + AROUND, len(pairs.first)))
        return {"name": name, "least": f"{least:g}", "above": [self._pair(pairs, place) for place in above],
                "below": [self._pair(pairs, place) for place in below]}  # fmt: skip

    def groups(self, numbers: np.ndarray, beyond: np.ndarray | None = None) -> dict[str, Any]:
        """Returns the groups of several videos, spread evenly from the largest to the smallest; with `beyond` only
        those that are more than one group of that division."""
        sizes = np.bincount(numbers)
        several = np.flatnonzero(sizes > 1)
        order = np.argsort(numbers, kind="stable")
        begins = np.cumsum(sizes) - sizes
        members = {group: order[begins[group] : begins[group] + sizes[group]] for group in several.tolist()}
        if beyond is not None:
            members = {group: some for group, some in members.items() if len(np.unique(beyond[some])) > 1}
        ranked = sorted(members, key=lambda group: (-sizes[group], group))
        chosen = np.unique(np.linspace(0, len(ranked) - 1, min(GROUPS, len(ranked))).round().astype(int)).tolist()
        shown = []
        for place in chosen:
            first, *others = [self.index[int(position)] for position in members[ranked[place]][:MEMBERS]]
            known = len({self.index[int(position)].source for position in members[ranked[place]]})
            text = f"{counted(int(sizes[ranked[place]]), 'video')} of {counted(known, 'source')} of the index."
            shown.append({"query": self._clip(first), "found": [self._clip(other) for other in others], "text": text})
        return {"count": len(ranked), "shown": shown}

    def pairs(self) -> Table:
        """Returns the table of the pairs within groups of near-duplicates, the most similar first."""
        pairs, positions = self.found.pairs.above(self.found.duplicate), self.found.compared.positions
        of_group = self.found.duplicates[positions]
        chosen = np.flatnonzero(of_group[pairs.first] == of_group[pairs.second])[:MOST_ROWS].tolist()
        names = names_of(list(self.index)) if chosen and len(self.index) <= MOST_NAMED else {}
        rows = []
        for place in chosen:
            videos = self._of(pairs, place)
            named = [names.get(video, str(video.path)) for video in videos]
            rows.append((*named, float(pairs.similarity[place]), *(video.split for video in videos)))
        columns = [Column("Video"), Column("Other video"), Column("Similarity", "number"), Column("Split"),
                   Column("Split of the other")]  # fmt: skip
        return Table("Near-duplicates", columns, rows)
