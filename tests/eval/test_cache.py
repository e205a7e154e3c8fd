"""Embeddings of a folder and the cache that keeps them."""

import shutil

import pytest
import torch

from eval.encoders import Encoder, PixelEncoder
from eval.files import content_hash
from eval.images import load_image, read_manifest
from eval.imageset import EmbeddingCache, ImageSet


class Counting(PixelEncoder):
    """Counts what it is asked to embed."""

    def __init__(self, identity="counting"):
        super().__init__(4)
        self.id = identity
        self.images = 0

    def embed_images(self, images):
        self.images += len(images)
        return super().embed_images(images)


def embed(run, encoder, cache=None, **options):
    return ImageSet.open(run, cache, **options).embeddings(encoder)


def test_cache_saves_the_encoder_work(make_run, tmp_path):
    run = make_run()
    rows = read_manifest(run)
    encoder, cache = Counting(), EmbeddingCache(tmp_path / "cache")
    first = embed(run, encoder, cache, batch_size=3)
    assert encoder.images == len(rows) == 16
    assert torch.equal(embed(run, encoder, cache), first)
    assert torch.equal(embed(run, encoder, EmbeddingCache(tmp_path / "cache")), first)
    assert encoder.images == 16, "a cached image was embedded again"
    other = Counting("other weights")
    embed(run, other, cache)
    assert other.images == 16, "another encoder's embeddings were taken"
    direct = other.embed_images([load_image(run / row.path) for row in rows])
    torch.testing.assert_close(direct, first)


def test_cache_follows_content_not_names(make_run, tmp_path):
    run, cache, encoder = make_run(), EmbeddingCache(tmp_path / "cache"), Counting()
    rows = read_manifest(run)
    before = embed(run, encoder, cache)
    shutil.copy(run / rows[1].path, run / rows[0].path)
    after = embed(run, encoder, cache)
    assert encoder.images == 16
    assert torch.equal(after[0], before[1])
    embed(make_run("elsewhere"), encoder, cache)
    assert encoder.images == 16, "the same content under another name was embedded again"


def test_cache_is_shared_by_processes_and_survives_a_kill(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.imageset.IMAGES_PER_SHARD", 4)
    run = make_run()
    here, there = EmbeddingCache(tmp_path / "cache"), EmbeddingCache(tmp_path / "cache")
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
    assert survivor.images == 16 - 10, "what was embedded before the end counts, by whatever process"
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_all_unreadable_images_are_named_before_any_is_embedded(make_run, tmp_path):
    run, encoder = make_run(), Counting()
    rows = read_manifest(run)
    damaged = [run / rows[index].path for index in (1, 14)]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf"got 2 others: .*{damaged[0]}.*{damaged[1]}"):
        embed(run, encoder, EmbeddingCache(tmp_path / "cache"))
    assert encoder.images == 0


def test_encoder_ids_with_slashes_stay_in_the_cache(tmp_path):
    cache = EmbeddingCache(tmp_path / "cache")
    cache.put("../a/b", {"x": torch.ones(3)})
    assert torch.equal(cache.get("../a/b", ["x"])["x"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("damage", [lambda content: b"garbage", lambda content: content[:-3] + b"abc"])
def test_a_damaged_cache_is_named_and_made_again(damage, make_run, tmp_path, caplog):
    run, encoder = make_run(), Counting()
    expected = embed(run, encoder, EmbeddingCache(tmp_path / "cache"))
    (shard,) = (tmp_path / "cache").rglob("*.safetensors")
    shard.write_bytes(damage(shard.read_bytes()))
    for embedded in (32, 32):
        found = embed(run, encoder, EmbeddingCache(tmp_path / "cache"))
        assert torch.equal(found, expected) and encoder.images == embedded
    assert caplog.text.count(str(shard)) == 1


def test_a_shard_that_cannot_be_read_is_named_and_stays(make_run, tmp_path, caplog, monkeypatch):
    run, encoder = make_run(), Counting()
    expected = embed(run, encoder, EmbeddingCache(tmp_path / "cache"))
    (shard,) = (tmp_path / "cache").rglob("*.safetensors")
    cache = EmbeddingCache(tmp_path / "cache")
    keys = [content_hash(run / row.path) for row in read_manifest(run)]
    assert len(cache.get(encoder.id, keys)) == len(set(keys))

    def refused(*_, **__):
        raise PermissionError("not yours")

    monkeypatch.setattr("eval.imageset.safe_open", refused)
    assert cache.get(encoder.id, keys) == {} and shard.is_file()
    assert f"{shard} cannot be read (not yours)" in caplog.text
    monkeypatch.undo()
    assert torch.equal(embed(run, encoder, cache), expected) and encoder.images == 16


def test_batch_size_does_not_matter_and_repeats_are_embedded_once(make_run):
    run = make_run()
    rows = read_manifest(run)
    expected = embed(run, PixelEncoder())
    for size in (1, 5, 100):
        torch.testing.assert_close(embed(run, PixelEncoder(), batch_size=size), expected)
    shutil.copy(run / rows[1].path, run / rows[0].path)
    encoder = Counting()
    embed(run, encoder)
    assert encoder.images == 15


def test_embeddings_refuse(make_run):
    run = make_run()
    rows = read_manifest(run)

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
    (run / rows[0].path).unlink()
    with pytest.raises(FileNotFoundError, match=r"00\.png"):
        embed(run, PixelEncoder())


def test_progress_is_shown_only_for_work(make_run, tmp_path, capsys):
    run, cache = make_run(), EmbeddingCache(tmp_path / "cache")
    embed(run, PixelEncoder(), cache, progress=True)
    assert "16/16" in capsys.readouterr().err
    embed(run, PixelEncoder(), cache, progress=True)
    assert capsys.readouterr().err == ""
