import shutil
import sys

import numpy as np
import pytest

from experiments.data import DataError, TextData, documents, load, manifest

tfds = pytest.importorskip("tensorflow_datasets")


class TinyText(tfds.core.GeneratorBasedBuilder):
    """A dataset as others write them: it knows nothing of this project."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012  (as the base class has it)
        tfds.core.BuilderConfig(name="three"),
        tfds.core.BuilderConfig(name="two"),
        tfds.core.BuilderConfig(name="one"),
        tfds.core.BuilderConfig(name="strange"),
    ]
    SPLITS = {  # noqa: RUF012
        "three": ("train", "validation", "test"),
        "two": ("train", "test"),
        "one": ("train",),
        "strange": ("left", "right"),
    }

    def _info(self):
        features = {
            "text": tfds.features.Text(),
            "title": tfds.features.Text(),
            "year": tfds.features.Scalar(np.int64),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.SPLITS[self.builder_config.name]}

    def _generate_examples(self, split):
        for i in range(20):
            yield i, {"text": f"{split} ä {i}\n" * (i + 1), "title": f"title {i}", "year": 1900 + i}


class TinyBroken(TinyText):
    BUILDER_CONFIGS = []  # noqa: RUF012

    def _split_generators(self, dl_manager):
        raise ModuleNotFoundError("No module named 'tensorflow'")


class TinyNumbers(TinyText):
    BUILDER_CONFIGS = []  # noqa: RUF012

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Scalar(np.int64)})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": ((i, {"text": i}) for i in range(3))}


@pytest.fixture
def settings(tmp_path):
    return {"data_dir": str(tmp_path / "data"), "tfds_dir": str(tmp_path / "tfds"), "length": 64}


def expected(split):
    return {f"{split} ä {i}\n" * (i + 1) for i in range(20)}


def texts(config, split):
    found = [bytes(d.tokens.tolist()).decode() for d in documents(config, split)]
    assert len(set(found)) == len(found)
    return set(found)


def test_prepared_data_is_read_without_its_code_and_without_tensorflow(settings, tmp_path):
    made = tmp_path / "made"
    TinyText(config="three", data_dir=made, file_format="array_record").download_and_prepare()
    # Under a name for which there is no code, as for builders that need TensorFlow.
    shutil.copytree(made / "tiny_text" / "three", tmp_path / "tfds" / "unknown_text" / "three")
    for path in (tmp_path / "tfds").rglob("tiny_text*"):
        path.rename(path.with_name(path.name.replace("tiny_text", "unknown_text")))
    info = tmp_path / "tfds" / "unknown_text" / "three" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("tiny_text", "unknown_text"))
    for name in ("unknown_text/three", "unknown_text/three:1.0.0"):
        config = TextData(source=f"tfds:{name}", **settings)
        for split in ("train", "validation", "test"):
            assert texts(config, split) == expected(split)
        assert next(load(config))["tokens"].any()
    assert "tensorflow" not in sys.modules


def test_a_dataset_is_prepared_if_it_is_not(settings):
    config = TextData(source="tfds:tiny_text/two", **settings)
    assert texts(config, "train") == expected("train")
    assert texts(config, "validation") == texts(config, "test") == expected("test")
    described = manifest(config)
    assert described["dataset"] == "tiny_text/two/1.0.0"
    assert described["splits"]["validation"]["tfds_split"] == "test"
    assert described["splits"]["train"]["documents"] == 20
    assert described["tokenizer"]["name"] == "bytes"


def test_a_dataset_without_a_second_split_gives_a_tenth(settings):
    config = TextData(source="tfds:tiny_text/one", **settings)
    train, validation = texts(config, "train"), texts(config, "validation")
    assert (len(train), len(validation)) == (18, 2)
    assert train | validation == expected("train")


def test_another_feature(settings):
    config = TextData(source="tfds:tiny_text/one", tfds_feature="title", **settings)
    found = texts(config, "train") | texts(config, "validation")
    assert found == {f"title {i}" for i in range(20)}
    # The same dataset with another feature is other data, though neither is prepared again.
    assert texts(TextData(source="tfds:tiny_text/one", **settings), "train") < expected("train")


@pytest.mark.parametrize("feature", ["body", "year"])
def test_a_wrong_feature(settings, feature):
    config = TextData(source="tfds:tiny_text/one", tfds_feature=feature, **settings)
    with pytest.raises(DataError, match=f"tfds_feature='{feature}': .* it has text, title"):
        load(config)


def test_a_dataset_without_text(settings):
    with pytest.raises(DataError, match="it has no text at all: choose another dataset"):
        load(TextData(source="tfds:tiny_numbers", **settings))


def test_a_dataset_without_a_train_split(settings):
    with pytest.raises(DataError, match="it has no train split, only left, right"):
        load(TextData(source="tfds:tiny_text/strange", **settings))


@pytest.mark.parametrize("name", ["tiny_broken", "no_such_dataset"])
def test_what_cannot_be_prepared_says_which_extra_to_install(settings, tmp_path, name):
    with pytest.raises(DataError) as caught:
        load(TextData(source=f"tfds:{name}", **settings))
    message = str(caught.value)
    assert f"source='tfds:{name}': not prepared in {tmp_path / 'tfds'}" in message
    assert 'pip install -e ".[tensorflow]"' in message
    assert "file_format='array_record'" in message
    assert len(message) < 700  # not the list of all datasets


def test_data_in_the_format_of_tensorflow(settings, tmp_path):
    TinyText(config="one", data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    home = tmp_path / "tfds" / "tiny_text" / "one" / "1.0.0"
    for path in home.iterdir():
        path.rename(home / path.name.replace("array_record", "tfrecord"))
    info = home / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match=r"cannot be read at random .* Prepare the dataset again as array_record"):
        load(TextData(source="tfds:tiny_text/one", **settings))


def test_our_own_corpora_can_be_read_as_well(settings, tmp_path):
    """What the text sources write is an ordinary dataset."""
    from experiments.data import builder
    from experiments.data.corpus import Text

    split = [Text(f"{i}", t) for i, t in enumerate(("one", "two", "three"))]
    builder.write(tmp_path / "tfds", {"train": split, "validation": [Text("v", "four")]})
    assert texts(TextData(source="tfds:text_corpus", **settings), "train") == {"one", "two", "three"}
