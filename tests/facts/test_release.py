import os
import random
import signal
import zipfile
from pathlib import Path

import pytest
import torch
from small_release import write_release

from mas_embed import UserError, join_splits
from mas_embed.facts import make_fact_table, read_fact_release, read_word_vectors

SHARED = Path(os.environ.get("MAS_EMBED_DATA", Path(__file__).parents[2] / "../shared/data"))


def read(root, **options):
    return read_fact_release(
        root=str(root), split_name="2tasks_random", **{"image_size": 4, "normalization": "none"} | options
    )


@pytest.fixture
def release(tmp_path):
    return write_release(tmp_path / "release")


def test_the_table_of_facts(release):
    facts = read(release).facts
    assert facts.ids.tolist() == [2, 4, 7, 11]
    assert facts.names == ["<person, riding>", "<person, riding, horse>", "<person>", "<dog>"]
    assert facts.weights.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 0, 0]]
    # Six numbers are three vectors of two; absent slots are zero though the file has numbers for them
    assert facts.targets[0].tolist() == [2.0, 2.125, 2.25, 2.375, 0.0, 0.0]
    assert facts.targets[1].tolist() == [4.0, 4.125, 4.25, 4.375, 4.5, 4.625]
    assert facts.targets[3].tolist() == [11.0, 11.125, 0.0, 0.0, 0.0, 0.0]


def test_every_image_goes_with_its_fact(release):
    splits = read(release)
    assert [split.name for split in splits] == ["B1", "B2"]
    for split, ids in zip(splits, ([7, 2], [11, 4]), strict=True):
        for part, count, is_test in ((split.train, 6, 0), (split.query, 3, 1)):
            assert len(part) == 2 * count
            seen = set()
            for image, label in part:
                fact_id, number, at_test = (image[:, 0, 0] * 255).round().int().tolist()
                assert splits.facts.ids[label] == fact_id and at_test == is_test
                seen.add((fact_id, number))
            assert seen == {(fact_id, number) for fact_id in ids for number in range(count)}
        assert split.gallery is split.query
    everything = join_splits(splits)
    assert len(everything.train) == 24 and len(everything.query) == 12
    assert everything.train[20][1] == splits[1].train[8][1]
    assert torch.equal(everything.train[20][0], splits[1].train[8][0])
    ids = [*everything.train.ids.tolist(), *everything.query.ids.tolist()]
    assert len(set(ids)) == 36


def test_validation_is_taken_from_training_images_alone(release):
    test, validation = read(release), read(release, held_out="validation")
    for whole, split in zip(test, validation, strict=True):
        paths = [set(map(str, part.inputs.paths)) for part in (split.train, split.query)]
        assert paths[0] | paths[1] == set(map(str, whole.train.inputs.paths)) and not paths[0] & paths[1]
        assert split.query.labels.unique().tolist() == whole.train.labels.unique().tolist()
        assert len(split.query) == 2  # one of six, of each of two facts
    again = read(release, held_out="validation", seed=1)
    assert any(a.query.inputs.paths != b.query.inputs.paths for a, b in zip(validation, again, strict=True))


def test_an_image_of_two_splits_is_validated_in_both_or_in_neither(release):
    folder = release / "splits/2tasks_random"
    lines = [path.read_text().splitlines() for path in (folder / "B1_train.csv", folder / "B2_train.csv")]
    for path, other in zip((folder / "B1_train.csv", folder / "B2_train.csv"), reversed(lines), strict=True):
        path.write_text(path.read_text() + "\n".join(other[1:]))
    splits = read(release, held_out="validation")
    trained, evaluated = (
        {path for split in splits for path in getattr(split, part).inputs.paths} for part in ("train", "query")
    )
    assert len(evaluated) == 4 and not trained & evaluated


def test_weights_may_be_written_as_words(release):
    path = release / "splits/2tasks_random/B1_train.csv"
    lines = path.read_text().replace(",7,1,0,0", ",7,True,False,0.0")
    path.write_text(lines)
    assert read(release).facts.weights[2].tolist() == [1, 0, 0]


def test_ids_may_have_a_fraction_of_zero_and_column_names_spaces(release):
    expected = read(release).facts
    folder = release / "splits/2tasks_random"
    change(folder / "B1_train.csv", ",7,1,0,0", ",7.0,1,0,0")
    change(folder / "B2_facts.csv", "11,1,dog", "11.,1,dog")
    change(folder / "B1_test.csv", ",NLP_links,SPO,id", ", NLP_links , SPO, id")
    assert torch.equal(read(release).facts.ids, expected.ids)


def change(path, old, new, count=-1):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("B1_train.csv", "train/7_0.jpg", "train/gone.jpg", "line 2 of .*B1_train.csv lists 'train/gone.jpg', but there is no"),
        ("B1_train.csv", "train/7_0.jpg", "../splits/2tasks_random/B1_train.csv", "B1_train.csv lists .* outside"),
        ("B1_train.csv", "facts/7.txt", "../../x", "line 2 of .*B1_train.csv lists '../../x', which lies outside"),
        ("B2_test.csv", ",11,1,0,0", ",11,1,1,0", "line 2 of .*B2_test.csv gives fact 11 the weights .* but line 2 of .*B2_train"),
        ("B1_test.csv", ",7,1,0,0", ",seven,1,0,0", "line 2 of .*B1_test.csv must have a whole number of 64 bits as id, got 'seven'"),
        ("B1_test.csv", ",7,1,0,0", ",7.5,1,0,0", "line 2 of .*B1_test.csv must have a whole number of 64 bits as id, got '7.5'"),
        ("B1_test.csv", ",7,1,0,0", f",{10**19},1,0,0", "must have a whole number of 64 bits as id, got '10000000000000000000'"),
        ("B1_test.csv", ",7,1,0,0", f",{2**63},1,0,0", "must have a whole number of 64 bits as id, got '9223372036854775808'"),
        ("B1_test.csv", ",7,1,0,0", ",7,one,0,0", "line 2 of .*B1_test.csv must have numbers >= 0 as w_s, w_p and w_o, got 'one'"),
        ("B1_test.csv", ",7,1,0,0", ",7,1,-1,0", "line 2 of .*B1_test.csv must have numbers >= 0 as w_s, w_p and w_o, got '-1'"),
        ("B1_test.csv", ",7,1,0,0", ",7,nan,0,0", "line 2 of .*B1_test.csv must have numbers >= 0 as w_s, w_p and w_o, got 'nan'"),
        ("B1_test.csv", ",7,1,0,0", ",7,1,0", "line 2 of .*B1_test.csv lacks w_o; it needs image_links"),
        ("B2_facts.csv", "11,1,dog", "12,1,dog", "line 2 of .*B2_train.csv has the fact 11, which no"),
        ("B2_facts.csv", "11,1,dog", "11,1,", "line 2 of .*B2_facts.csv has the words .* but line 2 of .*B2_train.csv gives"),
        ("B1_facts.csv", "id,type", "number,type", "line 1 of .*B1_facts.csv lacks id; it needs id, S, P, O"),
    ],
)  # fmt: skip
def test_the_line_with_a_mistake_is_named(release, name, old, new, message):
    change(release / "splits/2tasks_random" / name, old, new, 1)
    with pytest.raises(UserError, match=message):
        read(release)


def test_two_lines_that_give_a_fact_different_words_are_refused(release):
    folder = release / "splits/2tasks_random"
    change(folder / "B2_facts.csv", "11,1,dog,,", "11,1,dog,,\n7,1,cat,,")
    with pytest.raises(
        UserError, match="line 3 of .*B2_facts.csv gives fact 7 .*'cat'.* line 2 of .*B1_facts.csv gave"
    ):
        read(release)
    change(folder / "B2_facts.csv", "7,1,cat,,", "7,1,person,,\n11,1,cow,,")
    with pytest.raises(UserError, match="line 4 of .*B2_facts.csv gives fact 11 .* line 2 of .*B2_facts.csv gave"):
        read(release)
    change(folder / "B2_facts.csv", "\n11,1,cow,,", "")
    assert len(read(release).facts) == 4


def test_every_file_of_vectors_of_a_fact_holds_its_numbers(release):
    vectors = release / "NLP_feat/facts"
    change(release / "splits/2tasks_random/B1_test.csv", "facts/7.txt", "facts/again.txt", 1)
    with pytest.raises(UserError, match="line 2 of .*B1_test.csv lists 'facts/again.txt', but there is no such file"):
        read(release)
    # Absent slots may hold anything, in the file that is read first too
    (vectors / "again.txt").write_text("7.0 7.125 nan nan inf 1e99")
    (vectors / "11.txt").write_text("11.0 11.125 nan nan inf 1e99")
    assert read(release).facts.targets[2:].tolist() == [[7.0, 7.125, 0, 0, 0, 0], [11.0, 11.125, 0, 0, 0, 0]]
    for numbers in ("7.0 7.5 0 0 0 0", "7.0 0 0"):
        (vectors / "again.txt").write_text(numbers)
        with pytest.raises(
            UserError, match="line 2 of .*B1_test.csv gives fact 7 .*again.txt, .* line 2 of .*B1_train"
        ):
            read(release)


def test_files_that_are_missing_or_no_numbers(release):
    with pytest.raises(UserError, match="did you mean '2tasks_random'"):
        read_fact_release(root=str(release), split_name="2task_random")
    with pytest.raises(UserError, match="has no folder 'splits'"):
        read_fact_release(root=str(release / "images"))
    with pytest.raises(UserError, match="held_out must be 'test' or 'validation'"):
        read(release, held_out="train")
    path = release / "NLP_feat/facts/7.txt"
    path.write_text("1 2 three")
    with pytest.raises(UserError, match="cannot read numbers from .*7.txt"):
        read(release)
    for number in ("nan", "1e39"):
        path.write_text(f"1 {number} 3 4 5 6")
        with pytest.raises(UserError, match="7.txt holds a number that is not finite, or too large"):
            read(release)
    path.write_text("1 2 3 4")
    with pytest.raises(UserError, match="7.txt must hold three vectors of one size, got 4 numbers"):
        read(release)
    path.write_text("1 2 3")
    with pytest.raises(UserError, match="the vectors of fact 7 .* have 3 numbers, but those of fact 2 have 6"):
        read(release)
    (release / "splits/2tasks_random/B2_test.csv").unlink()
    with pytest.raises(UserError, match="there is no B2_test.csv in"):
        read(release)
    (release / "splits/2tasks_random/B1_train.csv").unlink()
    with pytest.raises(UserError, match="there is no B1_train.csv in"):
        read(release)


@pytest.mark.parametrize("content", ["", "image,fact\n"])
@pytest.mark.parametrize("name", ["train", "test", "facts"])
def test_files_without_the_columns_are_refused_though_they_have_no_lines(release, name, content):
    (release / f"splits/2tasks_random/B2_{name}.csv").write_text(content)
    with pytest.raises(UserError, match=f"line 1 of .*B2_{name}.csv lacks .*id"):
        read(release)


@pytest.mark.parametrize("name", ["B3_train.csv", "B3_test.csv", "B10_facts.csv"])
def test_no_split_between_the_first_and_the_last_may_be_missing(release, name):
    (release / "splits/2tasks_random" / name).write_text("")
    missing = "B3_test.csv" if name == "B3_train.csv" else "B3_train.csv"
    with pytest.raises(UserError, match=f"there is no {missing} in .* up to B{'10' if '10' in name else '3'}"):
        read(release)


def test_an_image_that_cannot_be_decoded_is_named_when_it_is_asked_for(release):
    (release / "images/train/7_0.png").write_bytes(b"no image")
    part = read(release)[0].train
    with pytest.raises(UserError, match="cannot read the image .*7_0.png"):
        list(part)


@pytest.fixture(scope="module")
def nlvr(tmp_path_factory):
    archive = SHARED / "nlvr_facts.zip"
    if not archive.exists():
        pytest.skip(f"there is no {archive}; set MAS_EMBED_DATA to the folder that holds it")
    root = tmp_path_factory.mktemp("nlvr")
    with zipfile.ZipFile(archive) as file:
        file.extractall(root)
    return root


@pytest.mark.parametrize("name", ["4tasks_random", "4tasks_semantic"])
def test_a_real_folder_of_this_layout(nlvr, name):
    splits = read_fact_release(root=str(nlvr), split_name=name, image_size=48, normalization="none")
    assert [split.name for split in splits] == ["B1", "B2", "B3", "B4"]
    assert sum(len(split.train) for split in splits) == 7371
    assert sum(len(split.query) for split in splits) == 3725
    assert torch.bincount(splits.facts.orders).tolist() == [0, 9, 27, 162]
    labels = [set(split.train.labels.tolist()) for split in splits]
    assert len(set.union(*labels)) == sum(map(len, labels)) == 198
    image, label = splits[2].train[100]
    assert image.shape == (3, 48, 48) and 0 <= image.min() < image.max() <= 1
    assert label in labels[2]


def test_targets_from_words_are_those_of_the_release(nlvr):
    facts = read_fact_release(root=str(nlvr), image_size=48).facts
    made = make_fact_table(facts.words, read_word_vectors(nlvr / "info/word_vectors.txt"))
    assert (made.vectors - facts.vectors).abs().max() < 1e-6  # six digits after the point
    assert torch.equal(made.weights, facts.weights)


def test_damaged_files_are_read_or_refused_in_one_sentence(release):
    random_bytes, messages = random.Random(0), []
    files = sorted(path for path in release.rglob("*") if path.suffix in (".csv", ".txt"))
    hostile = [
        b"\0",
        b"1e999",
        b"9" * 5000,
        b"nan",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"x" * 140_000,
        b'"',
        b",",
        b"\r",
        b"-1",
        b"",
    ]
    for _ in range(120):
        path = random_bytes.choice(files)
        content = path.read_bytes()
        start = random_bytes.randrange(len(content))
        end = random_bytes.choice([start, start + 1, len(content)])
        path.write_bytes(content[:start] + random_bytes.choice(hostile) + content[end:])
        try:
            read(release)
        except UserError as error:
            messages.append(str(error))
        path.write_bytes(content)
    assert len(messages) > 60
    assert all("\n" not in message and len(message) < 700 for message in messages)


@pytest.mark.parametrize("suffix", [".csv", ".txt"])
def test_folders_and_pipes_in_place_of_files_are_never_waited_for(release, suffix):
    signal.alarm(20)
    for path in sorted(path for path in release.rglob("*") if path.suffix == suffix)[:3]:
        content = path.read_bytes()
        path.unlink()
        for make, remove in ((os.mkdir, os.rmdir), (os.mkfifo, os.remove)):
            make(path)
            with pytest.raises(UserError, match=path.name):
                read(release)
            remove(path)
        path.write_bytes(content)
    signal.alarm(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "1 <= size <= short_side"),
        ({"image_size": 10**9}, "short_side <= 16384, got size 1000000000"),
        ({"keep_megabytes": -1}, "keep_megabytes must be at least 0, got -1"),
        ({"seed": -1, "held_out": "validation"}, "seed must be at least 0, got -1"),
    ],
)
def test_numbers_outside_their_range_are_refused(release, options, message):
    with pytest.raises(UserError, match=message):
        read(release, **options)
