"""The images of a folder in groups, their embeddings, and the cache of embeddings."""

import shutil

import pytest
import torch

from eval.encoders import Encoder, PixelEncoder
from eval.files import content_hash
from eval.images import load_image, read_manifest
from eval.imageset import EmbeddingCache, ImageSet


class Counting(PixelEncoder):
    """Counts the images that it embeds."""

    def __init__(self, identity="counting"):
        super().__init__(4)
        self.id = identity
        self.images = 0

    def embed_images(self, images):
        self.images += len(images)
        return super().embed_images(images)


@pytest.fixture
def run(make_run):
    return make_run()


@pytest.fixture
def open_cache(tmp_path):
    """Return a function that opens the same cache, as another process would."""
    return lambda: EmbeddingCache(tmp_path / "cache")


def embed(run, encoder, cache=None, **options):
    return ImageSet.open(run, cache, **options).embeddings(encoder)


def test_images_are_grouped_and_texts_are_embedded_once(run, scripted, monkeypatch):
    images = ImageSet(run, read_manifest(run)[::-1])
    assert [row.path for row in images.rows] == sorted(row.path for row in images.rows)
    names = ("bird/000000", "bird/000001", "fish/000000", "fish/000001")
    assert images.groups == {name: list(range(4 * i, 4 * i + 4)) for i, name in enumerate(names)}
    assert images.texts == ["a photo of a bird"] * 8 + ["a photo of a fish"] * 8
    encoder = scripted([], {"a photo of a bird": [1, 0], "a photo of a fish": [0, 1]})
    assert torch.equal(images.text_embeddings(encoder), torch.eye(2).repeat_interleave(8, dim=0))
    monkeypatch.setattr(encoder, "embed_texts", None)
    images.text_embeddings(encoder)


def test_the_cache_follows_encoder_and_content_not_names(run, make_run, open_cache):
    rows, encoder, other = read_manifest(run), Counting(), Counting("other weights")
    first = embed(run, encoder, open_cache(), batch_size=3)
    assert torch.equal(embed(run, encoder, open_cache()), first)
    embed(make_run("elsewhere"), encoder, open_cache())
    assert encoder.images == len(rows) == 16, "an image was embedded twice"
    embed(run, other, open_cache())
    assert other.images == 16, "another encoder's embeddings were reused"
    torch.testing.assert_close(other.embed_images([load_image(run / row.path) for row in rows]), first)
    shutil.copy(run / rows[1].path, run / rows[0].path)
    changed = embed(run, encoder, open_cache())
    assert encoder.images == 16 and torch.equal(changed[0], first[1])
    repeats = Counting()
    torch.testing.assert_close(embed(run, repeats, batch_size=5), changed)
    assert repeats.images == 15, "equal images are embedded once"


def test_the_cache_is_shared_by_processes_and_survives_a_kill(run, tmp_path, open_cache, monkeypatch):
    monkeypatch.setattr("eval.imageset.IMAGES_PER_SHARD", 4)
    here, there = open_cache(), open_cache()
    assert here.get("counting", ["unknown"]) == {}

    class Dying(Counting):
        def embed_images(self, images):
            if self.images >= 10:
                raise KeyboardInterrupt
            return super().embed_images(images)

    with pytest.raises(KeyboardInterrupt):
        embed(run, Dying(), there, batch_size=2)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 3
    survivor = Counting()
    embed(run, survivor, here)
    assert survivor.images == 16 - 10, "embeddings from before the kill count"
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    here.put("../a/b", {"x": torch.ones(3)})
    assert torch.equal(here.get("../a/b", ["x"])["x"], torch.ones(3))
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "run"}, "slashes of an id stay in the cache"


@pytest.mark.parametrize("damage", [lambda content: b"garbage", lambda content: content[:-3] + b"abc"])
def test_a_damaged_cache_is_named_and_made_again(damage, run, tmp_path, open_cache, caplog):
    encoder = Counting()
    expected = embed(run, encoder, open_cache())
    (shard,) = (tmp_path / "cache").rglob("*.safetensors")
    shard.write_bytes(damage(shard.read_bytes()))
    for _ in range(2):
        assert torch.equal(embed(run, encoder, open_cache()), expected) and encoder.images == 32
    assert caplog.text.count(str(shard)) == 1


def test_a_shard_that_cannot_be_read_is_named_and_stays(run, tmp_path, open_cache, caplog, monkeypatch):
    encoder, cache = Counting(), open_cache()
    expected = embed(run, encoder, open_cache())
    (shard,) = (tmp_path / "cache").rglob("*.safetensors")

    def refused(*_, **__):
        raise PermissionError("not yours")

    with monkeypatch.context() as patch:
        patch.setattr("eval.imageset.safe_open", refused)
        assert cache.get(encoder.id, [content_hash(run / row.path) for row in read_manifest(run)]) == {}
    assert shard.is_file() and f"{shard} cannot be read (not yours)" in caplog.text
    assert torch.equal(embed(run, encoder, cache), expected) and encoder.images == 16


def test_errors_are_reported_before_any_image_is_embedded(run, open_cache):
    encoder, rows = Counting(), read_manifest(run)
    damaged = [run / rows[index].path for index in (1, 14)]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf"got 2 others: .*{damaged[0]}.*{damaged[1]}"):
        embed(run, encoder, open_cache())
    damaged[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"01\.png"):
        embed(run, encoder)
    assert encoder.images == 0


def test_embeddings_that_are_not_finite_and_empty_sets_are_refused(run):
    class Broken(Encoder):
        name = id = "broken"

        def embed_images(self, images):
            return torch.full((len(images), 2), float("nan"))

    with pytest.raises(ValueError, match=r"finite.*00\.png"):
        embed(run, Broken())
    with pytest.raises(ValueError, match="batch size"):
        embed(run, PixelEncoder(), batch_size=0)
    with pytest.raises(ValueError, match="at least one image"):
        ImageSet(run, [])


def test_progress_is_shown_only_for_work(run, open_cache, capsys):
    for shown in (True, False):
        embed(run, PixelEncoder(), open_cache(), progress=True)
        error = capsys.readouterr().err
        assert ("16/16" in error) == shown == bool(error)
