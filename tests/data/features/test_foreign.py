"""Features that other programs wrote become a store: every form gives the same one, and bad input is named."""

import os

import numpy as np
import pytest
import torch
from support.data_sets.small_stores import features_of, make_clips

from cpr_fast.data.features.adopt import adopt
from cpr_fast.data.features.index import StoredClips
from cpr_fast.errors import InputError

COUNT, SAMPLES, WIDTH = 23, 3, 7
CLIPS = make_clips(COUNT)
NAMES = [clip.path.removesuffix(".avi") for clip in CLIPS]  # such as "c1/v2"
VALUES = features_of(COUNT, SAMPLES, WIDTH, "rgb")


def folder_of(tmp_path, suffix, save, values=VALUES, names=NAMES):
    for name, value in zip(names, values, strict=True):
        path = tmp_path / "theirs" / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, value)
    return tmp_path / "theirs"


def table_of(tmp_path, clips=CLIPS, header="path,label,source,split", columns=4):
    path = tmp_path / "table.csv"
    path.write_text(header + "\n" + "".join(",".join(clip[:columns]) + "\n" for clip in clips))
    return path


def npy(tmp_path):
    return folder_of(tmp_path, ".npy", np.save)


def npz(tmp_path):
    return folder_of(tmp_path, ".npz", lambda path, value: np.savez(path, features=value, other=np.zeros(2)))


def pt(tmp_path):
    return folder_of(tmp_path, ".pt", lambda path, value: torch.save(torch.from_numpy(value), path))


def one_npz(tmp_path):
    np.savez(tmp_path / "all.npz", features=VALUES, names=np.array(NAMES), labels=np.arange(COUNT))
    return tmp_path / "all.npz"


def npz_by_name(tmp_path):
    np.savez(tmp_path / "all.npz", **dict(zip(NAMES, VALUES, strict=True)))
    return tmp_path / "all.npz"


def pt_by_name(tmp_path):
    torch.save({name: torch.from_numpy(value) for name, value in zip(NAMES, VALUES, strict=True)}, tmp_path / "all.pt")
    return tmp_path / "all.pt"


def one_pt(tmp_path):
    torch.save({"features": torch.from_numpy(VALUES), "names": NAMES}, tmp_path / "all.pt")
    return tmp_path / "all.pt"


def one_h5(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file["features"], file["names"] = VALUES, NAMES
    return tmp_path / "all.h5"


def h5_by_name(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "all.hdf5", "w") as file:
        for name, value in zip(NAMES, VALUES, strict=True):
            file[name] = value
    return tmp_path / "all.hdf5"


def one_npy(tmp_path):
    np.save(tmp_path / "all.npy", VALUES)
    return tmp_path / "all.npy"


FORMS = [npy, npz, pt, one_npz, npz_by_name, pt_by_name, one_pt, one_h5, h5_by_name]


@pytest.mark.parametrize("form", [*FORMS, one_npy])
def test_every_form_gives_the_features_of_the_clips_of_the_table(tmp_path, form):
    clips = CLIPS if form is one_npy else CLIPS[::-2]  # names are matched; without names the order counts
    report = adopt({"rgb": form(tmp_path)}, table_of(tmp_path, clips), tmp_path / "s", dtype="float32")
    found = StoredClips.open(tmp_path / "s")
    wanted = VALUES if form is one_npy else VALUES[::-2]
    assert report["clips"] == len(clips) and np.array_equal(found.store.samples("rgb", 0, len(clips)), wanted)
    assert [(v.label, v.source, v.split) for v in found] == [tuple(clip[1:]) for clip in clips]


@pytest.mark.parametrize("form", FORMS)
def test_without_a_table_the_names_tell_the_classes(tmp_path, form):
    adopt({"rgb": form(tmp_path)}, None, tmp_path / "s", dtype="float32")
    found = StoredClips.open(tmp_path / "s")
    rows = [NAMES.index(str(video.path.relative_to(tmp_path / "s"))) for video in found]
    assert sorted(rows) == list(range(COUNT))
    assert np.array_equal(found.store.samples("rgb", 0, COUNT), VALUES[rows])
    assert [video.label for video in found] == [CLIPS[row].label for row in rows] and not found.has_splits


def test_names_with_splits_and_of_ucf101_tell_splits_and_sources(tmp_path):
    names = ["train/Run/v_Run_g01_c01", "train/Run/v_Run_g01_c02", "Test/Jump/v_Jump_g02_c01", "odd"]
    adopt({"rgb": folder_of(tmp_path, ".npy", np.save, VALUES[:4], names)}, None, tmp_path / "s")
    found = {str(v.path.relative_to(tmp_path / "s")): v for v in StoredClips.open(tmp_path / "s")}
    assert [found[name].split for name in names] == ["train", "train", "test", ""]
    assert [found[name].label for name in names] == ["Run", "Run", "Jump", ""]
    assert found[names[0]].source == found[names[1]].source == "v_Run_g01" != found[names[2]].source


def test_two_views_are_matched_by_name_and_segments_are_chosen_evenly(tmp_path):
    flow = features_of(COUNT, 9, 4, "flow")
    torch.save({f"{name}.mp4": torch.from_numpy(value).bfloat16() for name, value in
                zip(NAMES[::-1], flow[::-1], strict=True)}, tmp_path / "flow.pt")  # fmt: skip
    adopt({"rgb": npy(tmp_path), "flow": tmp_path / "flow.pt"}, table_of(tmp_path), tmp_path / "s", samples=2)
    store = StoredClips.open(tmp_path / "s").store
    assert np.array_equal(store.samples("rgb", 0, COUNT)[..., :7], VALUES[:, [0, 2]].astype("float16"))
    wanted = torch.from_numpy(flow[:, [0, 8]].copy()).bfloat16().half().numpy()
    assert np.array_equal(store.samples("flow", 0, COUNT)[..., :4], wanted)
    with pytest.raises(InputError, match=r"expected equally many features .* got \{'rgb': 3, 'flow': 9\}; --samples M"):
        adopt({"rgb": tmp_path / "theirs", "flow": tmp_path / "flow.pt"}, None, tmp_path / "t")


def test_one_feature_per_clip_is_one_sample(tmp_path):
    np.save(tmp_path / "all.npy", VALUES[:, 0].astype(np.float64))
    adopt({"rgb": tmp_path / "all.npy"}, table_of(tmp_path), tmp_path / "s", dtype="float32")
    store = StoredClips.open(tmp_path / "s").store
    assert store.about.samples == 1 and np.array_equal(store.samples("rgb", 0, COUNT), VALUES[:, :1])


def refused(tmp_path, said, features, table=None, **options):
    with pytest.raises(InputError, match=said):
        adopt({"rgb": features}, table, tmp_path / "s", **options)
    assert not (tmp_path / "s" / "store.json").exists() or options


def test_missing_clips_are_named(tmp_path):
    features = npy(tmp_path)
    (features / "c1" / "v2.npy").unlink()
    (features / "c1" / "v3.npy").unlink()
    refused(tmp_path, "expected features of every one of the 23 clips of .*table.csv, but those of 2 are missing "
            r"\(first: 'c1/v2.avi'\); its 21 names are like 'c0/v0'", features, table_of(tmp_path))  # fmt: skip
    refused(tmp_path, "INDEX: expected 23 rows, one for each of .*all.npy', which has no names, got 22",
            one_npy(tmp_path), table_of(tmp_path, CLIPS[:-1]))  # fmt: skip
    refused(tmp_path, "INDEX: expected a table .* a row for each of the 23 rows", one_npy(tmp_path))


def test_a_view_without_names_needs_a_table_also_beside_one_with_names(tmp_path):
    views = {"rgb": npy(tmp_path), "flow": one_npy(tmp_path)}
    for features in (views, dict(reversed(views.items()))):
        with pytest.raises(InputError, match="INDEX: expected a table .* the 23 rows of '.*all.npy', .*; got none"):
            adopt(features, None, tmp_path / "s")
    assert not (tmp_path / "s").exists()
    adopt(views, table_of(tmp_path), tmp_path / "s", dtype="float32")
    store = StoredClips.open(tmp_path / "s").store
    assert np.array_equal(store.samples("flow", 0, COUNT), VALUES)
    assert np.array_equal(store.samples("rgb", 0, COUNT), VALUES)


def test_a_name_without_its_folder_must_be_that_of_one_clip(tmp_path):
    features = folder_of(tmp_path, ".npy", np.save, VALUES[:3], ["a/v1", "b/v1", "b/v2"])
    table = table_of(tmp_path, [("v2.avi",)], "path", 1)
    adopt({"rgb": features}, table, tmp_path / "s", dtype="float32")
    assert np.array_equal(StoredClips.open(tmp_path / "s").store.samples("rgb", 0, 1), VALUES[2:3])
    table = table_of(tmp_path, [("v2.avi",), ("v1.avi",)], "path", 1)
    with pytest.raises(InputError, match=r"those of 1 are missing \(first: 'v1.avi'\)"):
        adopt({"rgb": features}, table, tmp_path / "t")


def test_other_shapes_and_numbers_are_named(tmp_path):
    features = npy(tmp_path)

    def with_value(value, said, **options):
        np.save(features / "c2" / "v4.npy", value)
        with pytest.raises(InputError, match=said):
            adopt({"rgb": features}, None, tmp_path / f"s{len(list(tmp_path.iterdir()))}", **options)

    with_value(VALUES[0][:, :5], "theirs: 'c2/v4': expected 3 features of 7 dimensions, as of 'c0/v0', got 3 of 5")
    with_value(VALUES[0][:2], "'c2/v4': expected 3 features of 7 .* got 2 of 7; --samples M takes M evenly")
    with_value(VALUES[0][:1], "'c2/v4': expected 2 or more features of 7 dimensions.*got 1 of 7", samples=2)
    with_value(VALUES[None, 0], r"'c2/v4': expected features \[D\] or \[S, D\], got \[1, 3, 7\]")
    with_value(np.array(["a", "b"]), "'c2/v4': expected numbers, got an array of <U1")
    nan = VALUES[0].copy()
    nan[1, 1] = np.nan
    with_value(nan, "rgb: the features of 'c2/v4': expected finite numbers, got NaN or infinity")
    with_value(np.array([{}], dtype=object), "v4.npy: expected arrays of numbers that NumPy or torch saved, got: ")
    (features / "c2" / "v4.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match="v4.npy: expected arrays of numbers"):
        adopt({"rgb": features}, None, tmp_path / "x")


def test_files_that_are_no_features_are_named(tmp_path):
    refused(tmp_path, "--features rgb: expected a folder of .npy, .npz or .pt files, or one file .* does not exist",
            tmp_path / "nothing.npy")  # fmt: skip
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path, "--features rgb: .*has the suffix '.txt'", tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    refused(tmp_path, "--features rgb: .*holds no such file", tmp_path / "empty")
    features = npy(tmp_path)
    torch.save(torch.zeros(3), features / "c0" / "v1.pt")
    refused(tmp_path, "expected files of one kind in .*theirs', got 23 .npy and 1 .pt", features)
    np.savez(tmp_path / "bad.npz", features=VALUES, names=np.array(NAMES[:-2]))
    refused(tmp_path, "bad.npz: expected 23 names, one for each row of features, got 21", tmp_path / "bad.npz")
    np.save(tmp_path / "flat.npy", np.zeros(4))
    refused(tmp_path, r"flat.npy: expected features \[N, D\] or \[N, S, D\], got \[4\]", tmp_path / "flat.npy")
    (tmp_path / "theirs" / "c0" / "v1.pt").unlink()
    refused(tmp_path, "table.csv:1: expected a column 'path'", features, table_of(tmp_path, header="a,b,c,d"))
    refused(tmp_path, "table.csv:2: expected 4 fields, got 2", features, table_of(tmp_path, columns=2))
    refused(
        tmp_path, "expected every clip once, got 'c0/v0.avi' again", features, table_of(tmp_path, [*CLIPS, CLIPS[0]])
    )
    names = [clip._replace(path=clip.path.replace(".avi", suffix)) for clip in CLIPS[:1] for suffix in (".avi", ".mp4")]
    refused(tmp_path, "those of 'c0/v0.mp4' are also those of 'c0/v0.avi'", features, table_of(tmp_path, names))


@pytest.mark.parametrize("form", [npy, one_npz])
def test_a_store_is_not_continued_after_a_file_was_changed(tmp_path, form):
    features = form(tmp_path)
    assert adopt({"rgb": features}, None, tmp_path / "s")["computed"] == 1
    assert adopt({"rgb": features}, None, tmp_path / "s")["computed"] == 0
    changed = features / "c2" / "v4.npy" if features.is_dir() else features
    state = changed.stat()
    os.utime(changed, ns=(state.st_atime_ns, state.st_mtime_ns + 1))  # of the same size, below the top folder
    with pytest.raises(InputError, match="--out: .* holds a store of other features .*inputs that were changed"):
        adopt({"rgb": features}, None, tmp_path / "s")
    os.utime(changed, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert adopt({"rgb": features}, None, tmp_path / "s")["computed"] == 0
    if features.is_dir():
        changed.write_bytes(changed.read_bytes() + b"0")
        os.utime(changed, ns=(state.st_atime_ns, state.st_mtime_ns))
        with pytest.raises(InputError, match="--out: .* holds a store of other features"):
            adopt({"rgb": features}, None, tmp_path / "s")


def test_a_pickle_that_would_run_code_is_not_loaded(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save(Attack(), tmp_path / "bad.pt")
    refused(tmp_path, "bad.pt: expected tensors that torch.save wrote, .* by numpy.save", tmp_path / "bad.pt")
    assert not (tmp_path / "owned").exists()
