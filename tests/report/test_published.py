"""The file of published numbers is complete, and numbers that the paper gives twice are equal."""

from __future__ import annotations

import pytest

from cpr_fast.errors import InputError
from cpr_fast.report.sections.published import published_table, published_tables


def test_every_table_is_whole():
    for name, table in published_tables().items():
        assert table.rows and table.columns and table.protocol and table.title, name
        assert len({row.id for row in table.rows}) == len(table.rows)
        for row in table.rows:
            assert row.values and all(0 < value <= 100 for value in row.values.values()), (name, row)
            ranks = [row.values[key] for key in table.columns if key.startswith("r@") and key in row.values]
            assert ranks == sorted(ranks)


def test_what_the_paper_claims_stands_in_the_tables():
    stages = {row.id: row.values for row in published_table("stages").rows}
    assert [stages[n]["r@1"] for n in ("n1", "n3", "n5", "n7")] == [45.1, 46.5, 47.5, 47.8]
    methods = {row.id: row.values for row in published_table("methods").rows}
    assert methods["coclr"] == stages["n1"] and methods["coclr_cpr"] == stages["n7"]
    cmr = {row.id: row.values.get("cmr_median") for row in published_table("mining").rows}
    assert cmr["n7"] - cmr["n1"] == pytest.approx(5.5)  # the abstract's "outperforming previous work by 5.5 %"
    assert published_table("retrieval_ucf101").rows[1].values["r@1"] == 56.7
    assert published_table("finetune").rows[1].values == {"ucf101": 83.8, "hmdb51": 54.8}


def test_an_unknown_table_is_named():
    with pytest.raises(InputError, match="'nonsense'"):
        published_table("nonsense")
