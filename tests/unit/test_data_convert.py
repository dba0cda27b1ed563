# SPDX-License-Identifier: Apache-2.0
"""Videos with masks from one format to another and back: nothing changes, or what is lost is refused by name."""

import json

import numpy as np
import pytest
from PIL import Image
from vos_folders import save, write_vos_trees

from effsam3.cli import main
from effsam3.data.synthetic.videos import make_synthetic_sav
from effsam3.data.videos.vos import open_vos

SIZE = (24, 32)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    write_vos_trees(folder, 3, frames=10, side_px=48)
    make_synthetic_sav(folder / "sav_train", 3, frames=10, side_px=48)
    return folder


def convert(source, out, to, *options):
    """Convert and open the result; the exit code where nothing was written."""
    code = main(["data", "convert", str(source), "--to", to, "--out", str(out), *options])
    return code or {video.name: video for video in open_vos(out)}


def assert_same(given, found):
    """All that a video has is the same: names, frames, sizes, objects and every pixel of every mask."""
    assert given.keys() == found.keys()
    for name, video in given.items():
        other = found[name]
        assert (video.frames, video.size, video.annotated) == (other.frames, other.size, other.annotated)
        assert set(video.object_names.values()) == set(other.object_names.values())
        assert (video.read(range(video.frames)) == other.read(range(other.frames))).all()
        for index in video.annotated:
            one, two = (
                {each.object_names[number]: mask for number, mask in each.masks(index).items()}
                for each in (video, other)
            )
            assert one.keys() == two.keys()
            assert all((mask == two[key]).all() for key, mask in one.items()), (name, index)


def write_davis(folder, ids_by_video, frames=None):
    """Write {video: maps of ids, frame by frame}."""
    for name, maps in ids_by_video.items():
        for index in range(frames or len(maps)):
            image = Image.new("RGB", SIZE[::-1], (40 * index, 90, 0))
            save(image, folder / "JPEGImages" / name / f"{index:05d}.jpg")
        for index, ids_HW in enumerate(maps):
            save(Image.fromarray(ids_HW), folder / "Annotations" / name / f"{index:05d}.png")


def ids_map(**rows):
    """A map with the value N in the rows of idN=(start, stop)."""
    ids_HW = np.zeros(SIZE, np.uint8)
    for name, (start, stop) in rows.items():
        ids_HW[start:stop, 4:20] = int(name.removeprefix("id"))
    return ids_HW


# ---- nothing is lost


@pytest.mark.parametrize("to", ["coco_video", "youtube_vis"])
@pytest.mark.parametrize("frames", ["copy", "link"])
def test_folders_through_json_and_back(root, tmp_path, to, frames):
    given = {video.name: video for video in open_vos(root / "davis")}
    between = convert(root / "davis", tmp_path / "json", to, "--frames", frames)
    assert_same(given, between)
    assert_same(given, convert(tmp_path / "json", tmp_path / "davis", "davis"))
    file = next((tmp_path / "json" / "sav_000001").iterdir())
    assert file.is_symlink() == (frames == "link")
    assert file.read_bytes() == (root / "davis/JPEGImages/480p/sav_000001" / file.name).read_bytes()
    assert not (tmp_path / "davis" / "renamed.json").exists()


def test_sav_keeps_its_mp4_and_overlaps(root, tmp_path):
    given = {video.name: video for video in open_vos(root / "sav_train")}
    found = convert(root / "sav_train", tmp_path / "sav", "sav")
    assert_same(given, found)
    name = "sav_000001.mp4"
    assert (tmp_path / "sav" / name).read_bytes() == (root / "sav_train" / name).read_bytes()
    one, two = (
        json.loads((place / "sav_000003_manual.json").read_text()) for place in (root / "sav_train", tmp_path / "sav")
    )
    assert one | {"video_environment": "Own"} == two


def test_frames_of_a_video_file_become_images(root, tmp_path):
    (given,) = open_vos(root / "sav_train")[:1]
    (root / "sav_train" / "one.txt").write_text("sav_000001\n")
    options = ("--split", "one", "--lossy")  # an object of it is never visible
    assert convert(root / "sav_train", tmp_path / "no", "davis", "--frames", "link", *options) == 2
    found = convert(root / "sav_train", tmp_path / "davis", "davis", *options)["sav_000001"]
    assert (found.frames, found.annotated) == (10, [0, 4, 8])
    assert np.abs(found.read([3]).astype(int) - given.read([3])).mean() < 4  # saved as JPEGs


def test_ids_that_a_format_cannot_have_are_in_a_table(tmp_path):
    write_davis(tmp_path / "davis", {"v": [ids_map(id3=(2, 5), id9=(7, 9)), ids_map(id9=(1, 4))]})
    assert convert(tmp_path / "davis", tmp_path / "json", "coco_video")["v"].objects == [3, 9]
    file = tmp_path / "json" / "annotations.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation["track_id"] = {3: "dog", 9: "cat"}[annotation["track_id"]]
    file.write_text(json.dumps(content))
    (named,) = open_vos(tmp_path / "json")
    assert sorted(named.object_names.values()) == ["cat", "dog"]
    assert_same({"v": named}, convert(tmp_path / "json", tmp_path / "again", "coco_video"))
    found = convert(tmp_path / "json", tmp_path / "back", "davis")["v"]
    table = json.loads((tmp_path / "back" / "renamed.json").read_text())["v"]["objects"]
    assert found.objects == [1, 2] and set(table) == {"dog", "cat"}
    for word, number in (("dog", 3), ("cat", 9)):
        for index in (0, 1):
            truth = np.array(Image.open(tmp_path / "davis/Annotations/v" / f"{index:05d}.png")) == number
            assert (found.masks(index)[table[word]] == truth).all()


# ---- other programs read what is written


def test_pycocotools_reads_the_coco_json(root, tmp_path):
    from pycocotools.coco import COCO

    found = convert(root / "davis", tmp_path / "json", "coco_video")
    coco = COCO(str(tmp_path / "json" / "annotations.json"))
    places = {(image["file_name"].split("/")[0], image["order_in_video"]): image for image in coco.imgs.values()}
    assert len(places) == sum(len(video.annotated) for video in found.values())
    for name, video in found.items():
        for index in video.annotated:
            image = places[name, index]
            assert (image["height"], image["width"]) == video.size and (tmp_path / "json" / image["path"]).is_file()
            rows = coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]]))
            visible = {number: mask for number, mask in video.masks(index).items() if mask.any()}
            assert {row["track_id"] for row in rows} == visible.keys()  # absent: no annotation
            for row in rows:
                mask = visible[row["track_id"]]
                assert (coco.annToMask(row) == mask).all() and row["area"] == mask.sum()
                rows_of, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
                assert row["bbox"][:2] == [columns[0], rows_of[0]]


def test_youtube_vis_as_evaluators_want_it(root, tmp_path):
    """Uncompressed RLEs of whole frames, null for absence, a folder for each video in file_names."""
    from pycocotools import mask as coco_mask

    found = convert(root / "davis", tmp_path / "json", "youtube_vis")
    content = json.loads((tmp_path / "json" / "annotations.json").read_text())
    names = {row["id"]: row["file_names"][0].split("/")[0] for row in content["videos"]}
    assert sorted(names.values()) == sorted(found)
    objects = sum(len(video.objects) for video in found.values())
    assert len({row["id"] for row in content["annotations"]}) == len(content["annotations"]) == objects
    nulls = 0
    for track in content["annotations"]:
        video = found[names[track["video_id"]]]
        assert len(track["segmentations"]) == len(track["areas"]) == len(track["bboxes"]) == video.frames
        for index, rle in enumerate(track["segmentations"]):
            mask = video.masks(index)[track["track_id"]]
            assert (rle is None) == (not mask.any()) == (track["areas"][index] is None)
            nulls += rle is None
            if rle:
                assert (coco_mask.decode(coco_mask.frPyObjects(rle, *rle["size"])) == mask).all()
    assert nulls


def test_palette_pngs_have_eight_bits_and_colours(tmp_path):
    write_davis(tmp_path / "in", {"v": [ids_map(id1=(2, 5), id3=(7, 9))]})
    convert(tmp_path / "in", tmp_path / "out", "davis")
    data = (tmp_path / "out/Annotations/v/00000.png").read_bytes()
    assert data[24] == 8  # the header's bit depth: some decoders return other values for fewer
    with Image.open(tmp_path / "out/Annotations/v/00000.png") as image:
        assert image.mode == "P" and set(np.unique(image)) == {0, 1, 3}
        assert image.getpalette()[3:12] == [128, 0, 0, 0, 128, 0, 128, 128, 0]


# ---- what would be lost is refused


def refused(capsys, source, out, to, words, *options):
    """Conversion fails and writes nothing; with --lossy it says the same and writes the rest."""
    capsys.readouterr()
    assert convert(source, out, to, *options) == 2
    error = capsys.readouterr().err
    assert words in error and "--lossy" in error and not out.exists() and not list(out.parent.glob(".*partial"))
    found = convert(source, out, to, "--lossy", *options)
    assert words in capsys.readouterr().out
    return found


def test_overlaps_do_not_fit_into_a_png(root, tmp_path, capsys):
    given = {video.name: video for video in open_vos(root / "sav_train")}["sav_000003"]
    found = refused(capsys, root / "sav_train", tmp_path / "out", "davis", "3 frames have objects that overlap")
    table = json.loads((tmp_path / "out" / "renamed.json").read_text())["sav_000003"]["objects"]
    for index in given.annotated:
        truth, masks = given.masks(index), found["sav_000003"].masks(index)
        assert (masks[table["2"]] == truth[2]).all()  # a part of object 0, and so on top of it
        assert (masks[table["0"]] == truth[0] & ~truth[2]).all()


def test_json_lists_annotated_frames_only(root, tmp_path, capsys):
    for to in ("coco_video", "youtube_vis"):
        words = "21 frames without masks are left out"
        found = refused(capsys, root / "sav_train", tmp_path / to, to, words)["sav_000001"]
        assert found.frames == 3 and found.annotated == [0, 1, 2]


def test_sav_annotates_every_fourth_frame(root, tmp_path, capsys):
    found = refused(capsys, root / "davis", tmp_path / "out", "sav", "21 annotated frames are left out")
    assert found["sav_000001"].annotated == [0, 4, 8]


def test_an_object_without_a_png_is_not_the_same_as_an_absent_one(root, tmp_path, capsys):
    (root / "sav_val" / "one.txt").write_text("sav_000001\n")
    file = root / "sav_val/Annotations_6fps/sav_000001/001/00004.png"
    content = file.read_bytes()
    file.unlink()
    words = "1 objects on a frame are not annotated there"
    found = refused(capsys, root / "sav_val", tmp_path / "out", "sav", words, "--split", "one")["sav_000001"]
    file.write_bytes(content)
    assert not found.masks(4)[1].any()


def test_an_object_that_is_never_visible(tmp_path, capsys):
    write_davis(tmp_path / "in", {"v": [ids_map(id1=(2, 5))]})
    convert(tmp_path / "in", tmp_path / "vis", "youtube_vis")
    file = tmp_path / "vis" / "annotations.json"
    content = json.loads(file.read_text())
    never = {"id": 2, "track_id": 2, "segmentations": [None], "bboxes": [None]}
    content["annotations"].append(content["annotations"][0] | never)
    file.write_text(json.dumps(content))
    assert convert(tmp_path / "vis", tmp_path / "vis2", "youtube_vis")["v"].objects == [1, 2]
    for to in ("coco_video", "davis"):
        found = refused(capsys, tmp_path / "vis", tmp_path / to, to, "there (first: v, object 2)")
        assert found["v"].objects == [1]


def test_void_is_neither_object_nor_background(tmp_path, capsys):
    write_davis(tmp_path / "in", {"v": [ids_map(id1=(2, 5), id255=(5, 6)), ids_map(id1=(2, 5))]})
    for to in ("coco_video", "youtube_vis", "davis"):
        found = refused(capsys, tmp_path / "in", tmp_path / to, to, "1 masks have void")["v"]
        assert found.objects == [1] and found.masks(0)[1].sum() == 3 * 16


def test_a_png_holds_254_objects(tmp_path, capsys):
    ids_HW = np.zeros((20, 30), np.int32)
    ids_HW.flat[:300] = np.arange(1, 301)
    save(Image.new("RGB", (30, 20)), tmp_path / "in/JPEGImages/v/00000.jpg")
    save(Image.fromarray(ids_HW.astype(np.uint16)), tmp_path / "in/Annotations/v/00000.png")
    assert len(convert(tmp_path / "in", tmp_path / "json", "coco_video")["v"].objects) == 300
    found = refused(capsys, tmp_path / "in", tmp_path / "out", "davis", "46 objects are left out")["v"]
    assert len(found.objects) == 254


# ---- bad usage


def test_what_is_there_stays(root, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert convert(root / "davis", tmp_path, "coco_video") == 2
    assert "is there; name a new folder" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
    assert convert(tmp_path / "gone", tmp_path / "out", "davis") == 2


def test_a_damaged_frame_stops_it(tmp_path, capsys):
    write_davis(tmp_path / "in", {"v": [ids_map(id1=(2, 5)), ids_map(id1=(2, 6))]})
    (tmp_path / "in/Annotations/v/00001.png").write_bytes(b"no image")
    assert convert(tmp_path / "in", tmp_path / "out", "coco_video") == 2
    assert "00001.png" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_links_leave_their_targets_alone(root, tmp_path):
    source = root / "davis/JPEGImages/480p/sav_000001/00000.jpg"
    source.chmod(0o600)
    convert(root / "davis", tmp_path / "out", "coco_video", "--frames", "link")
    assert source.stat().st_mode & 0o777 == 0o600


def test_names_of_videos_become_folders(tmp_path):
    write_davis(tmp_path / "in", {"v": [ids_map(id1=(2, 5))]})
    convert(tmp_path / "in", tmp_path / "json", "coco_video")
    file = tmp_path / "json" / "annotations.json"
    content = json.loads(file.read_text())
    content["videos"][0]["name"] = "a: walk?"
    file.write_text(json.dumps(content))
    found = convert(tmp_path / "json", tmp_path / "out", "davis")
    assert list(found) == ["a_walk_"]
    assert json.loads((tmp_path / "out" / "renamed.json").read_text()) == {"a: walk?": {"name": "a_walk_"}}


def test_categories_stay_in_the_format_or_next_to_it(tmp_path):
    write_davis(tmp_path / "in", {"v": [ids_map(id1=(2, 5), id2=(8, 9))]})
    convert(tmp_path / "in", tmp_path / "json", "coco_video")
    file = tmp_path / "json" / "annotations.json"
    content = json.loads(file.read_text())
    content["categories"] = [{"id": 7, "name": "dog"}, {"id": 3, "name": "leash"}]
    for annotation in content["annotations"]:
        annotation["category_id"] = {1: 7, 2: 3}[annotation["track_id"]]
    file.write_text(json.dumps(content))
    for source, to in (("json", "youtube_vis"), ("youtube_vis", "coco_video")):
        assert convert(tmp_path / source, tmp_path / to, to)["v"].categories == {1: "dog", 2: "leash"}
    for to in ("davis", "sav"):
        assert convert(tmp_path / "coco_video", tmp_path / to, to)["v"].objects == [1, 2]
        table = json.loads((tmp_path / to / "categories.json").read_text())
        assert table == {"v": {"1": "dog", "2": "leash"}}
