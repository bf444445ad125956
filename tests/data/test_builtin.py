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


def test_importing_the_data_package_registers_the_built_in_sets(run_python):
    code = "import d2ext.data\nfrom detectron2.data import DatasetCatalog as C\nprint(C.list())"
    process = run_python("-c", code)
    assert process.returncode == 0, process.stderr
    assert "'shapes_train'" in process.stdout and "'voc_sds_val'" in process.stdout
