"""The format of a store: what is read back, what is refused, and how a store that was stopped is continued."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.data_sets.small_stores import features_of, make_clips, make_store

from cpr_fast.data.features.clips import Clip, ClipTable
from cpr_fast.data.features.index import StoredClips
from cpr_fast.data.features.store import Description, FeatureStore
from cpr_fast.data.features.write import Computed, planned_shards, write_store
from cpr_fast.data.index.index import Index
from cpr_fast.errors import InputError


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_are_read_across_shards_in_the_order_of_the_clips(tmp_path, dtype):
    store = make_store(tmp_path / "s", dtype=dtype)
    wanted = features_of(61, 3, 16, "flow").astype(dtype)
    assert [len(part) for part in (store.samples("flow", 0, 61), store.samples("flow", 22, 24))] == [61, 2]
    for begin, end in ((0, 61), (22, 24), (23, 46), (60, 61), (5, 50)):
        assert np.array_equal(store.samples("flow", begin, end), wanted[begin:end])


def test_the_evaluation_feature_is_the_mean_of_the_samples_where_none_is_stored(tmp_path):
    store = make_store(tmp_path / "s")
    rows = np.array([0, 3, 22, 23, 60])
    (found,) = store.evaluation("rgb", rows)
    wanted = features_of(61, 3, 16, "rgb").astype("float16").astype(np.float64).mean(1)[rows]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distance", [1, 7, 64, 65, 97])
@pytest.mark.parametrize("evaluation", [False, True])
def test_of_sparse_clips_little_more_than_their_features_is_read(tmp_path, monkeypatch, distance, evaluation):
    count, clips = 9001, make_clips(9001)
    values = np.random.default_rng(0).standard_normal((count, 2, 3), np.float32)

    def compute(positions: range) -> Computed:
        part = values[positions.start : positions.stop]
        return Computed(np.array(positions), {"rgb": part}, {"rgb": part[:, 1]} if evaluation else {})

    about = Description({"rgb": 3}, 2, evaluation, "float32", {}, "a", planned_shards(count, 2000))
    write_store(tmp_path / "s", clips, about, compute)
    store, asked = FeatureStore(tmp_path / "s"), []
    read = store._read
    monkeypatch.setattr(store, "_read", lambda view, name, begin, end: (asked.append(end - begin),
                                                                        read(view, name, begin, end))[1])  # fmt: skip
    rows = np.arange(distance - 1, count, distance)
    found = list(store.evaluation("rgb", rows))
    assert [len(part) for part in found] == [min(4096, len(rows) - begin) for begin in range(0, len(rows), 4096)]
    assert np.array_equal(np.concatenate(found), values[rows, 1] if evaluation else values[rows].mean(1))
    if distance > 64:
        assert asked == [1] * len(rows)
    else:
        assert sum(asked) <= count and max(asked) <= 4096 and len(asked) <= 2 * len(found) + 2


def test_a_view_with_fewer_dimensions_is_followed_by_zeros(tmp_path):
    store = make_store(tmp_path / "s", widths={"rgb": 16, "flow": 5})
    flow = store.samples("flow", 20, 30)
    assert flow.shape == (10, 3, 16)
    assert not flow[..., 5:].any() and flow[..., :5].all()


def test_the_clips_of_a_store_are_an_index(tmp_path):
    clips = [*make_clips(9), Clip('a "quoted", name;\n.avi', "", "", " Validation ")]
    found = StoredClips(make_store(tmp_path / "s", clips))
    plain = Index(list(found))
    assert [str(v.path.relative_to(tmp_path / "s")) for v in found] == [clip.path for clip in clips]
    assert found.labels.tolist() == plain.labels.tolist() and found.labels[-1] == -1
    assert found.source_ids.tolist() == plain.source_ids.tolist()
    assert found.classes == plain.classes and found.mostly_labelled
    train = found.select("train")
    assert train.source_ids.tolist() == plain.select("train").source_ids.tolist()
    assert [v.path for v in train] == [v.path for v in plain.select("train")]
    assert [v.path for v in found.select("validation")] == [tmp_path / "s" / clips[-1].path]
    with pytest.raises(InputError, match="split 'nope': the store .* has no such clip; its splits are"):
        found.select("nope")


def test_a_table_of_many_clips_keeps_their_sources():
    table = ClipTable([(f"v{i}", "", f"s{i % 7}" if i % 2 else "", "") for i in range(9000)])
    assert table.paths[8999] == "v8999" and len(table) == 9000
    for row in (0, 1, 4095, 4096, 8998, 8999):  # around the blocks in which rows are read
        assert table.source(row) == (f"s{row % 7}" if row % 2 else f"v{row}")
    assert len(set(table.sources.tolist())) == 7 + 4500
    named = {}
    for row, number in enumerate(table.sources.tolist()):
        assert named.setdefault(table.source(row), number) == number


def write(folder, count=50, *, stop=None, kept=None, source="a", spoil=None, dtype="float16", share=(0, 1)):
    """Writes a store of one view in shards of 20; returns the report and the shards that were computed."""
    clips, values, computed = make_clips(count), features_of(count, 2, 8, "rgb"), []
    if spoil is not None:
        values[spoil[0], 0, 3] = spoil[1]

    def compute(positions: range) -> Computed:
        if positions.start == stop:
            raise KeyboardInterrupt
        computed.append(positions.start)
        rows = np.array([i for i in positions if kept is None or i in kept])
        return Computed(rows.astype(np.int64), {"rgb": values[rows.astype(np.int64)]})

    about = Description({"rgb": 8}, 2, False, dtype, {}, source, planned_shards(count, 20))
    return write_store(folder, clips, about, compute, share=share), computed


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_store_that_was_stopped_is_continued_and_equals_one_that_was_not(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", stop=40)
    with pytest.raises(InputError, match="is not complete, 1 of its 3 shards are missing"):
        FeatureStore(tmp_path / "a", "data.features")
    report, computed = write(tmp_path / "a")
    assert computed == [40] and report["computed"] == 1 and report["clips"] == 50
    write(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert write(tmp_path / "a")[1] == []


def test_shares_in_any_order_write_the_bytes_of_one_process(tmp_path):
    """A share computes only its own shards, also after a stop, and the last one finishes the store."""
    kept = [*range(3, 20), *range(40, 47)]
    write(tmp_path / "one", 110, kept=kept)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", 110, kept=kept, share=(1, 3), stop=80)
    report, computed = write(tmp_path / "a", 110, kept=kept, share=(1, 3))
    assert computed == [80] and [report[name] for name in ("clips", "left_out", "waiting")] == [0, 40, 4]
    with pytest.raises(InputError, match="is not complete, 4 of its 6 shards are missing; .* without --shard$"):
        FeatureStore(tmp_path / "a", "data.features")
    report, computed = write(tmp_path / "a", 110, kept=kept, share=(0, 3))
    assert computed == [0, 60] and [report[name] for name in ("clips", "left_out", "waiting")] == [17, 63, 2]
    assert write(tmp_path / "a", 110, kept=kept, share=(0, 3))[1] == []
    report, computed = write(tmp_path / "a", 110, kept=kept, share=(2, 3))
    assert computed == [40, 100] and [report[name] for name in ("clips", "left_out", "waiting")] == [24, 86, 0]
    assert contents(tmp_path / "a") == contents(tmp_path / "one")
    report, computed = write(tmp_path / "a", 110, kept=kept, share=(6, 9))  # more shares than shards
    assert computed == [] and report["waiting"] == 0 and contents(tmp_path / "a") == contents(tmp_path / "one")


def test_a_command_without_shares_computes_what_they_left(tmp_path):
    write(tmp_path / "one", 110)
    write(tmp_path / "a", 110, share=(1, 3))
    report, computed = write(tmp_path / "a", 110)
    assert computed == [0, 40, 60, 100] and contents(tmp_path / "a") == contents(tmp_path / "one")


def test_shares_run_at_the_same_time_but_not_the_same_share(tmp_path):
    """Inside the computation of one share, another one runs, and the same one is refused."""
    clips, about = make_clips(50), Description({"rgb": 8}, 2, False, "float16", {}, "a", planned_shards(50, 20))
    values = features_of(50, 2, 8, "rgb")

    def compute(positions: range) -> Computed:
        if positions.start == 0:
            with pytest.raises(InputError, match=r"another process is writing the store .* \(share 0/2\)"):
                write(tmp_path / "s", share=(0, 2))
            assert write(tmp_path / "s", share=(1, 2))[1] == [20]
        return Computed(np.array(positions, np.int64), {"rgb": values[positions]})

    report = write_store(tmp_path / "s", clips, about, compute, share=(0, 2))
    write(tmp_path / "one")
    assert report["waiting"] == 0 and contents(tmp_path / "s") == contents(tmp_path / "one")


def test_clips_that_cannot_be_read_are_left_out_of_shards_and_table(tmp_path):
    kept = [*range(3, 20), *range(40, 47)]  # the second of three shards is empty
    report, _ = write(tmp_path / "s", kept=kept)
    store = FeatureStore(tmp_path / "s")
    assert report["clips"] == 24 and report["left_out"] == 26 and store.about.shards == [17, 0, 7]
    assert [v.path.name for v in StoredClips(store)] == [f"v{i}.avi" for i in kept]
    assert np.array_equal(store.samples("rgb", 10, 24), features_of(50, 2, 8, "rgb").astype("float16")[kept][10:])
    with pytest.raises(InputError, match="none could be read"):
        write(tmp_path / "t", kept=[])


def test_a_folder_of_something_else_is_never_written_to(tmp_path):
    write(tmp_path / "s")
    with pytest.raises(InputError, match="--out: .* holds a store of other features"):
        write(tmp_path / "s", source="b")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="--out: expected a new folder or a store"):
        write(tmp_path / "t")
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("value, said", [(np.nan, "expected finite numbers, got NaN"), (np.inf, "expected finite"),
                                         (70000, "7e\\+04 is too large for float16; use --dtype float32")])  # fmt: skip
def test_features_that_cannot_be_stored_are_named(tmp_path, value, said):
    with pytest.raises(InputError, match=f"rgb: the features of 'c2/v13.avi': {said}"):
        write(tmp_path / "s", spoil=(13, value))
    if value == 70000:
        write(tmp_path / "t", spoil=(13, value), dtype="float32")


def damage(store, name, change):
    """Rewrites a shard with other tensors."""
    path = store.folder / name
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_store_that_is_not_as_it_says_is_refused_with_the_file_and_what_was_expected(tmp_path):
    store = make_store(tmp_path / "s")
    name = "flow-00001.safetensors"

    def refused(said):
        with pytest.raises(InputError, match=said):
            FeatureStore(store.folder, "data.features")

    original = (store.folder / name).read_bytes()
    damage(store, name, lambda tensors: tensors.update(samples=tensors["samples"][..., :12].copy()))
    refused(
        r"flow-00001.safetensors: expected samples float16 \[23, 3, 16\], as store.json states, got float16 \[23, 3"
    )
    damage(store, name, lambda tensors: tensors.update(samples=tensors["samples"][:22].astype("f4")))
    refused(r"got float32 \[22, 3, 12\]")
    damage(store, name, lambda tensors: tensors.pop("samples"))
    refused("flow-00001.safetensors: expected samples .* got none")
    (store.folder / name).write_bytes(original[:-5])
    refused("flow-00001.safetensors: expected a safetensors file, got a damaged one")
    (store.folder / name).unlink()
    refused("flow-00001.safetensors: the shard is missing")
    (store.folder / name).write_bytes(original)
    FeatureStore(store.folder)
    table = (store.folder / "clips.csv").read_text()
    (store.folder / "clips.csv").write_text(table[: table.rindex("c")])
    refused("clips.csv: expected the 61 clips that store.json states, got 60|expected four fields")
    about = (store.folder / "store.json").read_text()
    for text in (
        "{}",
        "",
        "[]",
        about.replace("23", '"23"'),
        about.replace('"rgb"', '"depth"'),
        about.replace('"version": 1', '"version": 2'),
        about.replace('"samples": 3', '"samples": 0'),
    ):
        (store.folder / "store.json").write_text(text)
        refused("store.json: expected the description of a store")
    with pytest.raises(InputError, match="data.features: expected a store of features.*holds no store.json"):
        FeatureStore(tmp_path, "data.features")


@pytest.mark.parametrize("change", [
    lambda path, _: path.write_bytes(path.read_bytes()[:-1]),
    lambda path, _: path.write_bytes(b""),
    lambda path, tensors: save_file(tensors | {"samples": tensors["samples"].astype("f4")}, path),
    lambda path, tensors: save_file(tensors | {"samples": tensors["samples"][:, :1].copy()}, path),
    lambda path, tensors: save_file(tensors | {"samples": tensors["samples"][..., :7].copy()}, path),
    lambda path, tensors: save_file(tensors | {"samples": tensors["samples"][:19].copy()}, path),
    lambda path, tensors: save_file({"samples": tensors["samples"]}, path),
    lambda path, tensors: save_file({name: np.concatenate([some, some]) for name, some in tensors.items()}, path),
])  # fmt: skip
def test_a_damaged_shard_is_computed_again_with_the_same_bits(tmp_path, caplog, change):
    write(tmp_path / "s")
    before, path = contents(tmp_path / "s"), tmp_path / "s" / "rgb-00001.safetensors"
    change(path, load_file(path))
    report, computed = write(tmp_path / "s")
    assert computed == [20] and report["computed"] == 1 and contents(tmp_path / "s") == before
    assert "rgb-00001.safetensors: expected" in caplog.text and "the shard is computed again" in caplog.text


def test_a_shard_of_which_one_view_is_damaged_is_computed_again(tmp_path):
    store = make_store(tmp_path / "s")
    before = contents(store.folder)
    path = store.folder / "flow-00002.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    make_store(tmp_path / "s")
    assert contents(store.folder) == before


def test_shards_and_description_are_on_the_disk_before_they_get_their_names(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("cpr_fast.runtime.files._sync", lambda path: synced.append(path.suffix))
    write(tmp_path / "s")
    files = [suffix for suffix in synced if suffix]
    assert files == [".json", *[".safetensors"] * 3, ".csv", ".json"]


def test_nan_in_a_shard_is_named_with_its_clip_when_it_is_read(tmp_path):
    store = make_store(tmp_path / "s")
    damage(store, "rgb-00002.safetensors", lambda tensors: tensors["samples"].__setitem__((4, 1, 2), np.nan))
    store = FeatureStore(store.folder)  # opening reads no feature
    with pytest.raises(InputError, match=r"rgb-00002.safetensors: expected finite features, .* row 50, 'c1/v50.avi'"):
        list(store.evaluation("rgb", np.arange(61)))
    assert len(list(store.evaluation("rgb", np.arange(50)))) == 1


def test_the_digest_tells_stores_of_other_clips_or_settings_apart(tmp_path):
    clips = make_clips(20)
    digests = [make_store(tmp_path / "0", clips).about.digest, make_store(tmp_path / "1", clips).about.digest]
    assert digests[0] == digests[1]
    digests += [make_store(tmp_path / "2", clips[:-1]).about.digest, make_store(tmp_path / "3", clips, samples=2)
                .about.digest]  # fmt: skip
    assert len(set(digests)) == 3
