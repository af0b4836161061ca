"""Image folders as they come: official parts, folders of systems, links, copies."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pfedmoe_mpi.data import Dataset
from support.data_files import all_rows, data_error, open_data, random_images, write_image_folder
from support.launcher import SMALL_RUN, run_program

CLASSES = {"ant": 3, "bee": 2}


def write_parts(root: Path, *parts: str) -> Path:
    """Write each part with the same class folders."""
    for part in parts:
        write_image_folder(root / part, CLASSES)
    return root


def check_rows(data: Dataset, parts: int) -> None:
    """Check that the data are so many parts of `CLASSES`, the second of them the official test part."""
    assert data.class_names == ("ant", "bee") and data.labels.tolist() == [0, 0, 0, 1, 1] * parts
    part = np.concatenate([random_images(3, 8, 10, 3, seed=0), random_images(2, 8, 10, 3, seed=1)])
    assert np.array_equal(all_rows(data), np.concatenate([part.transpose(0, 3, 1, 2)] * parts))
    if parts == 1:
        assert data.official_test is None
    else:
        assert data.official_test is not None and data.official_test.tolist() == [False] * 5 + [True] * 5


# official parts


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"),
        ("training", "testing"),
        ("Train", "Test"),
        ("TRAINING", "TEST"),
        ("training_set", "test_set"),
        ("trainset", "testset"),
        ("TrainImages", "TestImages"),
        ("Training Data", "Testing Data"),
    ],
)
def test_official_parts_are_recognised_by_their_usual_names(tmp_path: Path, train: str, test: str) -> None:
    check_rows(open_data("folder", write_parts(tmp_path, train, test)), parts=2)


@pytest.mark.parametrize("name", ["val", "valid", "Validation", "val_set"])
def test_a_validation_part_is_named_and_not_read(tmp_path: Path, name: str) -> None:
    data = open_data("folder", write_parts(tmp_path / "three", "train", "test", name))
    check_rows(data, parts=2)
    assert (
        f"read train and test, not {name}; " in data.warnings[0]
        and "--partition.validation" in data.warnings[0]
    )
    data = open_data("folder", write_parts(tmp_path / "two", "Train", name))
    check_rows(data, parts=1)
    assert f"read Train, not {name}; " in data.warnings[0] and "rename it to test" in data.warnings[0]


def test_other_folders_beside_the_parts_are_named(tmp_path: Path) -> None:
    write_parts(tmp_path, "train", "test", "unlabelled")
    (tmp_path / "annotations").mkdir()
    data = open_data("folder", tmp_path)
    check_rows(data, parts=2)
    assert [warning.partition(": ")[2] for warning in data.warnings[:1]] == [
        "read train and test, not annotations, unlabelled"
    ]
    for number in range(10):
        (tmp_path / f"z{number}").mkdir()
    assert open_data("folder", tmp_path).warnings[0].endswith(" z6, z7 and 2 more")


def test_a_part_may_be_given_alone(tmp_path: Path) -> None:
    write_parts(tmp_path, "train", "testing")
    check_rows(open_data("folder", tmp_path / "testing"), parts=1)
    (tmp_path / "only").mkdir()
    (tmp_path / "train").rename(tmp_path / "only" / "train")
    check_rows(open_data("folder", tmp_path / "only"), parts=1)


@pytest.mark.parametrize(
    ("parts", "pattern"),
    [
        (["train", "Training", "test"], "holds two train parts, Training and train"),
        (["train", "test", "val", "valid"], "holds two validation parts, val and valid"),
        (["test", "val"], "holds test and val, but no training part"),
        (["photos", "test"], "holds test, but no training part"),
        (
            ["seg_train", "seg_test"],
            "seg_test looks like an official part: seg_train also holds a folder ant",
        ),
        (["train2017", "val2017"], "train2017 looks like an official part"),
        (["MyTrain", "other"], "MyTrain looks like an official part"),
        (["mnist_png"], "holds a single folder, mnist_png"),
    ],
)
def test_an_unclear_layout_is_refused(tmp_path: Path, parts: list[str], pattern: str) -> None:
    data_error(pattern, "folder", write_parts(tmp_path, *parts))


def test_parts_without_class_folders_are_refused(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "flat", {"training": 2, "testing": 2})
    data_error("training has no class folders", "folder", tmp_path / "flat")
    write_image_folder(tmp_path / "half" / "train", CLASSES)
    write_image_folder(tmp_path / "half", {"test": 2})
    data_error("test has no class folders", "folder", tmp_path / "half")


def test_a_class_may_have_the_name_of_a_part(tmp_path: Path) -> None:
    data = open_data("folder", write_image_folder(tmp_path / "a", {"bus": 2, "train": 3}))
    assert (data.class_names, data.labels.tolist()) == (("bus", "train"), [0, 0, 1, 1, 1])
    for part in ("train", "test"):
        write_image_folder(tmp_path / "b" / part, {"test": 1, "train": 1, "valley": 1})
    assert open_data("folder", tmp_path / "b").class_names == ("test", "train", "valley")


def test_folders_inside_classes_belong_to_the_class(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "ant", {"2020": 1, "2021": 1})
    write_image_folder(tmp_path / "bee", {"2020": 2})
    data = open_data("folder", tmp_path)
    assert (data.class_names, data.labels.tolist()) == (("ant", "bee"), [0, 0, 1, 1])
    assert not any("read as classes" in warning for warning in data.warnings)


def test_the_same_folders_in_every_class_are_pointed_out(tmp_path: Path) -> None:
    data = open_data("folder", write_parts(tmp_path, "amazon", "dslr", "webcam"))
    assert data.class_names == ("amazon", "dslr", "webcam")
    assert "its 3 folders are read as classes, but all of them hold folders ant, bee" in data.warnings[0]


def test_commands_print_a_warning_once(tmp_path: Path) -> None:
    for part in ("train", "valid"):
        write_image_folder(tmp_path / "images" / part, {"ant": 40, "bee": 40}, shape=(8, 8))
    source = ("--data.source", "folder", "--data.path", "images", "--clients", "2")
    expected = f"warning: data.path = {tmp_path}/images: read train, not valid; "
    for ranks, command in (
        (2, [*SMALL_RUN, *source, "--dry"]),
        (0, ["data", "prepare", "images.h5", *source]),
        (0, ["data", "partition", "partition.h5", *source]),
    ):
        result = run_program(ranks, *command, cwd=tmp_path)
        assert result.code == 0, result.err
        assert result.err.count("warning: ") == result.err.count(expected) == 1, result.err


# folders of systems, links, files that are not read


@pytest.mark.parametrize(
    "name", [".ipynb_checkpoints", ".hidden", "@eaDir", "__MACOSX", "$RECYCLE.BIN", "lost+found"]
)
def test_hidden_and_system_folders_are_skipped_at_every_level(tmp_path: Path, name: str) -> None:
    write_parts(tmp_path, "train", "test")
    for folder in (tmp_path, tmp_path / "train", tmp_path / "train" / "ant", tmp_path / "test" / "bee"):
        write_image_folder(folder / name, {"ant": 1})
        write_image_folder(folder, {name + "/deeper": 2})
    data = open_data("folder", tmp_path)
    check_rows(data, parts=2)
    assert not any(name in warning for warning in data.warnings)
    (tmp_path / "train" / "ant" / "._0.png").write_bytes(b"resource fork")
    check_rows(open_data("folder", tmp_path / "train"), parts=1)


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("self", "."),
        ("up", ".."),
        ("ant/self", "."),
        ("ant/up", ".."),
        ("ant/top", "../.."),
        ("ant/itself", "itself"),
        ("bee/deep/up", "../.."),
    ],
)
def test_links_that_loop_are_not_followed(tmp_path: Path, link: str, target: str) -> None:
    root = write_image_folder(tmp_path / "root", CLASSES)
    (root / "bee" / "deep").mkdir()
    (root / link).symlink_to(target)
    data = open_data("folder", root)
    check_rows(data, parts=1)
    assert not data.warnings


def test_links_to_other_folders_are_followed_once(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "store", CLASSES)
    (tmp_path / "root" / "bee").mkdir(parents=True)
    (tmp_path / "root" / "ant").symlink_to("../store/ant")
    for name in ("one", "two"):
        (tmp_path / "root" / "bee" / name).symlink_to("../../store/bee")
    check_rows(open_data("folder", tmp_path / "root"), parts=1)
    (tmp_path / "link").symlink_to("root")
    check_rows(open_data("folder", tmp_path / "link"), parts=1)


def test_links_between_classes_end(tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(12)]
    write_image_folder(tmp_path, dict.fromkeys(names, 1))
    for name in names:
        for other in names:
            (tmp_path / name / other).symlink_to(f"../{other}")
    assert len(open_data("folder", tmp_path)) == 12 * 12, "paths through links are 12 factorial"


def test_images_that_are_not_files_are_refused(tmp_path: Path) -> None:
    broken = write_image_folder(tmp_path, CLASSES) / "ant" / "z.png"
    broken.symlink_to("nowhere.png")
    data_error("z.png is not a file, or links to none", "folder", tmp_path)
    broken.unlink()
    os.mkfifo(broken)
    data_error("z.png is not a file, or links to none", "folder", tmp_path)


def test_images_that_are_not_read_are_named(tmp_path: Path) -> None:
    write_image_folder(tmp_path, CLASSES)
    for path in (tmp_path / "preview.png", tmp_path / "ant" / "photo.HEIC", tmp_path / "bee" / "notes.txt"):
        path.write_bytes(b"anything")
    data = open_data("folder", tmp_path)
    check_rows(data, parts=1)
    (warning,) = data.warnings
    assert f"images that are not read: 2, for example {tmp_path}/ant/photo.HEIC; " in warning


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = write_image_folder(tmp_path, CLASSES) / "bee" / "locked"
    locked.mkdir()
    listed = os.scandir

    def scandir(path: Path | str) -> object:
        if str(path) == str(locked):
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    data_error("locked cannot be listed: Permission denied", "folder", tmp_path)


def test_hidden_text_files_are_not_clients(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "._a.txt"):
        (tmp_path / name).write_text("one two three four five six seven " * 9)
    assert open_data("words", tmp_path, length=4).client_names == ("a", "b")


# copies


def test_copies_are_counted(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"ant": 3, "bee": 2})
    assert not open_data("folder", tmp_path).warnings
    shutil.copy(tmp_path / "ant" / "1.png", tmp_path / "ant" / "1 (copy).png")
    with Image.open(tmp_path / "ant" / "0.png") as image:
        image.save(tmp_path / "ant" / "0.bmp")
    data = open_data("folder", tmp_path)
    assert len(data) == 7, "copies are reported, not removed"
    assert data.warnings == (
        f"images with the pixels of an earlier one: 2 of 7; for example {tmp_path / 'ant' / '0.bmp'} and "
        f"{tmp_path / 'ant' / '0.png'}; remove copies",
    )


def test_copies_in_the_test_part_and_in_other_classes_are_counted(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "train", {"ant": 3, "bee": 3})
    write_image_folder(tmp_path / "test", {"ant": 1}, shape=(8, 10))
    (tmp_path / "test" / "bee").mkdir()
    shutil.copy(tmp_path / "train" / "bee" / "0.png", tmp_path / "train" / "bee" / "copy.png")
    shutil.copy(tmp_path / "train" / "bee" / "1.png", tmp_path / "test" / "bee" / "1.png")
    shutil.copy(tmp_path / "train" / "ant" / "2.png", tmp_path / "test" / "bee" / "2.png")
    assert open_data("folder", tmp_path).warnings == (
        "images with the pixels of an earlier one: 3 of 10, 2 across training and test part, 1 across "
        f"classes; for example {tmp_path}/train/bee/1.png and {tmp_path}/test/bee/1.png; remove copies",
    )


def test_folders_named_by_numbers_sort_as_numbers(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_image_folder(tmp_path / part, {str(k): 1 + k for k in range(12)}, (2, 2))
    data = open_data("folder", tmp_path)
    assert data.class_names == tuple(map(str, range(12)))
    assert np.bincount(data.labels).tolist() == [2 * (1 + k) for k in range(12)]
