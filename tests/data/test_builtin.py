"""Registration of the data sets that are known by name."""

from d2ext.data import register_all

from detectron2.data import MetadataCatalog


def test_register_all_is_idempotent_and_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "a"))
    register_all()
    register_all()
    assert MetadataCatalog.get("shapes_train").json_file.startswith(str(tmp_path / "a"))
    stuff = MetadataCatalog.get("coco_2017_val_stuff")
    assert stuff.sem_seg_root == str(tmp_path / "a/coco/stuffthingmaps/val2017")
    assert stuff.num_semantic_labels == 183 and len(stuff.thing_classes) == 80
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "b"))
    register_all()
    assert MetadataCatalog.get("shapes_train").json_file.startswith(str(tmp_path / "b"))
